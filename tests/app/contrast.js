// Every visible text against what is behind it, and the edge of every control against its surroundings, with
// contrast as WCAG 2.2 defines it: 4.5 for text, 3 for large text and for edges.
() => {
  const parse = (colour) => {
    const [r, g, b, a = 1] = colour.match(/[\d.]+/g).map(Number);
    return { r, g, b, a };
  };
  const over = (top, below) => {
    const mix = (channel) => top[channel] * top.a + below[channel] * (1 - top.a);
    return { r: mix("r"), g: mix("g"), b: mix("b"), a: 1 };
  };
  const behind = (element) => {
    const layers = [];
    for (let one = element; one; one = one.parentElement) {
      layers.push(parse(getComputedStyle(one).backgroundColor));
      if (layers.at(-1).a === 1) break;
    }
    return layers.reduceRight((below, top) => over(top, below), { r: 255, g: 255, b: 255, a: 1 });
  };
  const linear = (value) => (value / 255 <= 0.04045 ? value / 255 / 12.92 : ((value / 255 + 0.055) / 1.055) ** 2.4);
  const luminance = ({ r, g, b }) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
  const ratio = (one, other) => {
    const [low, high] = [luminance(one), luminance(other)].sort((x, y) => x - y);
    return (high + 0.05) / (low + 0.05);
  };
  const seen = (element) =>
    element.checkVisibility({ opacityProperty: true, visibilityProperty: true }) && element.offsetWidth > 0;

  const poor = [];
  const check = (what, element, colour, ground, least) => {
    const found = ratio(over(colour, ground), ground);
    if (found < least) poor.push(`${what} ${found.toFixed(2)} < ${least}: ${element.outerHTML.slice(0, 120)}`);
  };

  let texts = 0;
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.textContent.trim() || element.closest("script, style, svg, :disabled")) continue;
    if (!seen(element)) continue;
    const style = getComputedStyle(element);
    const size = parseFloat(style.fontSize);
    const large = size >= 24 || (size >= 18.66 && style.fontWeight >= 700);
    check("text", element, parse(style.color), behind(element), large ? 3 : 4.5);
    texts++;
  }

  let edges = 0;
  for (const element of document.querySelectorAll("textarea, #model .wrap, .tab-like-container, .card button")) {
    if (!seen(element) || element.disabled || element.matches(".tile")) continue;
    const ground = behind(element.parentElement);
    const style = getComputedStyle(element);
    const filled = ratio(behind(element), ground) >= 3;
    if (!filled) check("edge", element, parse(style.borderTopColor), ground, 3);
    edges++;
    if (!element.placeholder) continue;
    const faint = parse(getComputedStyle(element, "::placeholder").color);
    check("placeholder", element, faint, behind(element), 4.5);
  }
  return { poor, texts, edges };
}
