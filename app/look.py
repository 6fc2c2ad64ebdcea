"""How the page looks and feels: theme, style sheet, and the little script that the browser runs itself.

Colours are chosen for WCAG 2.2 AA: text at least 4.5:1 and the edges of controls at least 3:1 against what
is behind them, in light and in dark (measured by tests/app/test_browser.py). Fonts are the system's own:
the page loads nothing from elsewhere.
"""

import gradio as gr

SANS = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "Noto Sans", "DejaVu Sans", "sans-serif"]
MONO = ["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "DejaVu Sans Mono", "monospace"]

ACCENT = "#4f46e5"
ACCENT_STRONG = "#4338ca"
# name of a Gradio theme variable -> colour in light, colour in dark
COLOURS = {
    "body_background_fill": ("#f5f6f8", "#0e1117"),
    "body_text_color": ("#161a22", "#e8ebf1"),
    "body_text_color_subdued": ("#555e6e", "#a6b0c0"),
    "background_fill_primary": ("#ffffff", "#161b23"),
    "background_fill_secondary": ("#eef0f4", "#1e242e"),
    "block_background_fill": ("#ffffff", "#161b23"),
    "block_border_color": ("#dde1e8", "#2b3340"),
    "block_title_text_color": ("#161a22", "#e8ebf1"),
    "block_label_text_color": ("#161a22", "#e8ebf1"),
    "block_info_text_color": ("#555e6e", "#a6b0c0"),
    "border_color_primary": ("#dde1e8", "#2b3340"),
    "border_color_accent": (ACCENT, "#a5b4fc"),
    "color_accent_soft": ("#eef2ff", "#252b4a"),
    "input_background_fill": ("#ffffff", "#0e1117"),
    "input_border_color": ("#7a8291", "#6b7688"),
    "input_border_color_focus": (ACCENT, "#a5b4fc"),
    "input_placeholder_color": ("#6a7281", "#98a2b3"),
    "slider_color": (ACCENT, "#818cf8"),
    "link_text_color": (ACCENT_STRONG, "#a5b4fc"),
    "link_text_color_hover": (ACCENT, "#c7d2fe"),
    "link_text_color_visited": (ACCENT_STRONG, "#a5b4fc"),
    "checkbox_background_color": ("#ffffff", "#0e1117"),
    "checkbox_background_color_selected": (ACCENT, ACCENT),
    "checkbox_border_color": ("#7a8291", "#6b7688"),
    "checkbox_border_color_selected": (ACCENT, "#a5b4fc"),
    "checkbox_label_background_fill": ("transparent", "transparent"),
    "checkbox_label_background_fill_hover": ("transparent", "transparent"),
    "checkbox_label_background_fill_selected": ("transparent", "transparent"),
    "checkbox_label_text_color": ("#161a22", "#e8ebf1"),
    "checkbox_label_text_color_selected": ("#161a22", "#e8ebf1"),
    "button_primary_background_fill": (ACCENT, ACCENT),
    "button_primary_background_fill_hover": (ACCENT_STRONG, ACCENT_STRONG),
    "button_primary_border_color": (ACCENT, ACCENT),
    "button_primary_text_color": ("#ffffff", "#ffffff"),
    "button_secondary_background_fill": ("#ffffff", "#1e242e"),
    "button_secondary_background_fill_hover": ("#eef0f4", "#2b3340"),
    "button_secondary_border_color": ("#7a8291", "#6b7688"),
    "button_secondary_text_color": ("#161a22", "#e8ebf1"),
    "button_cancel_background_fill": ("#b42318", "#b42318"),
    "button_cancel_background_fill_hover": ("#912018", "#912018"),
    "button_cancel_text_color": ("#ffffff", "#ffffff"),
}
SIZES = {
    "block_border_width": "0px",
    "block_shadow": "none",
    "block_radius": "10px",
    "block_padding": "0px",
    "block_title_text_weight": "600",
    "block_title_text_size": "14px",
    "block_info_text_size": "13px",
    "body_text_size": "15px",
    "button_border_width": "1px",
    "button_large_radius": "8px",
    "button_large_text_size": "15px",
    "button_large_text_weight": "600",
    "button_small_radius": "999px",
    "button_small_text_size": "13px",
    "button_small_text_weight": "400",
    "button_transition": "background-color 120ms",
    "checkbox_label_padding": "0px",
    "checkbox_label_border_width": "0px",
    "checkbox_label_shadow": "none",
    "checkbox_label_text_weight": "400",
    "form_gap_width": "14px",
    "input_border_width": "1px",
    "input_radius": "8px",
    "input_shadow": "none",
    "input_text_size": "15px",
    "layout_gap": "14px",
}


def theme() -> gr.themes.Base:
    """Return the Gradio theme made of the tables above."""
    base = gr.themes.Base(
        primary_hue=gr.themes.colors.indigo,
        neutral_hue=gr.themes.colors.slate,
        font=[gr.themes.Font(name) for name in SANS],
        font_mono=[gr.themes.Font(name) for name in MONO],
    )
    light = {name: pair[0] for name, pair in COLOURS.items()}
    dark = {f"{name}_dark": pair[1] for name, pair in COLOURS.items()}
    return base.set(**light, **dark, **SIZES)


CSS = """
.gradio-container {
  max-width: 1240px !important; margin: 0 auto !important; padding: 0 20px 40px !important;
}
.gradio-container > main, .gradio-container .main { padding: 0 !important; }
body { background: var(--body-background-fill) !important; }
footer { display: none !important; }
:focus-visible { outline: 2px solid var(--border-color-accent) !important; outline-offset: 2px; }

/* Head of the page */
.masthead { display: flex; align-items: center; gap: 12px; padding: 18px 0 6px; }
.masthead h1 { font-size: 20px; font-weight: 700; letter-spacing: -0.01em; margin: 0; }
.masthead p { margin: 0; color: var(--body-text-color-subdued); font-size: 14px; }
.masthead button { margin-left: auto; }
.plain-button {
  display: inline-flex; align-items: center; justify-content: center; min-height: 38px;
  padding: 6px 14px; cursor: pointer; font: inherit; font-size: 14px; font-weight: 500;
  text-decoration: none !important; white-space: nowrap;
  color: var(--button-secondary-text-color); background: var(--button-secondary-background-fill);
  border: 1px solid var(--button-secondary-border-color); border-radius: 8px;
}
.plain-button:hover { background: var(--button-secondary-background-fill-hover); }
.plain-button[aria-pressed="true"] { background: var(--color-accent-soft); }
.plain-button.primary { color: #fff; border-color: transparent; }
.plain-button.primary { background: var(--button-primary-background-fill); }
.plain-button.primary:hover { background: var(--button-primary-background-fill-hover); }

/* Two columns: what to make, what was made */
.studio { align-items: flex-start; gap: 20px !important; flex-wrap: wrap; }
.card {
  background: var(--block-background-fill); border: 1px solid var(--border-color-primary);
  border-radius: 14px; padding: 18px !important; gap: 14px !important;
}
.card .form { background: none; border: 0; gap: 14px; overflow: visible; box-shadow: none; }
.card .block { background: none; overflow: visible !important; }
.inputs { gap: 16px !important; }
.chips { gap: 8px !important; flex-wrap: wrap !important; margin-top: -8px; }
.chips button { flex: none !important; min-width: 0 !important; width: auto !important; padding: 5px 12px; }
.pair { gap: 20px !important; flex-wrap: nowrap !important; }
.pair > .form { display: grid; grid-template-columns: 1fr 1fr; gap: 20px; width: 100%; }
.pair .block { min-width: 0 !important; }
.card button.lg { min-height: 46px; }
.hint-line { color: var(--body-text-color-subdued); font-size: 13px; margin: 0; }
kbd {
  font: 12px var(--font-mono); padding: 1px 5px; border-radius: 4px;
  background: var(--background-fill-secondary); border: 1px solid var(--border-color-primary);
}

/* Gradio's slider: label and number on one line, the help below, all the way across */
.gradio-container { --groove: #d5dae3; }
.dark .gradio-container, .gradio-container.dark { --groove: #3a4453; }
.card .head {
  display: grid !important; grid-template-columns: 1fr auto; gap: 2px 6px !important; align-items: center;
  margin: 0 0 8px !important;
}
.card .head label { display: contents; }
.card .head label > span { margin: 0 !important; }
.card .head .info-text { grid-column: 1 / -1; grid-row: 2; }
.card .head .tab-like-container { grid-column: 2; grid-row: 1; height: 28px; margin: 0 !important; }
.card .head input[type="number"] { width: 74px; min-width: 0; text-align: right; font-size: 14px; }
.card .info-text { margin: 0; line-height: 1.35; }
.card input[type="range"] { --neutral-200: var(--groove); }  /* Gradio's groove is light in the dark */
.card input[type="range"]::-webkit-slider-thumb { border: 2px solid var(--slider-color); }
.card input[type="range"]::-moz-range-thumb { border: 2px solid var(--slider-color); }
.with-button { align-items: flex-end !important; gap: 10px !important; flex-wrap: nowrap !important; }
.with-button > .form { flex: 1 1 auto !important; }
.with-button button { min-height: 41px !important; font-size: 14px; font-weight: 500; }
#form .wrap:has(> .wrap-inner) { border: 1px solid var(--input-border-color); border-radius: 8px; }
#form .wrap-inner input { padding: 8px 12px; }

.card .block:has(input[type="file"]), .card .block:has(.file-preview) {
  border: 1px dashed var(--input-border-color) !important; border-radius: 8px;
}

.edges { margin: 0; display: flex; align-items: center; gap: 12px; }
.edges img { width: 120px; height: auto; border-radius: 8px; border: 1px solid var(--border-color-primary); }
.edges figcaption { font-size: 13px; color: var(--body-text-color-subdued); }

/* Badges and messages */
.badge {
  display: inline-block; padding: 1px 7px; border-radius: 5px; font-size: 11.5px; font-weight: 700;
  letter-spacing: 0.05em; line-height: 1.6; color: #7a2e0e; background: #fdeadb; border: 1px solid #f3b98c;
}
.dark .badge { color: #fbd5b5; background: #43230f; border-color: #8a4a1f; }
.about { font-size: 13.5px; line-height: 1.5; color: var(--body-text-color-subdued); margin: 0; }
.message { border-radius: 10px; padding: 11px 14px; font-size: 14.5px; line-height: 1.45; border: 1px solid; }
.message p { margin: 0; overflow-wrap: anywhere; }
.message p + p { margin-top: 4px; }
.message.bad { color: #7a1610; background: #fef1f0; border-color: #e9a29c; }
.dark .message.bad { color: #fdcdc8; background: #3a1512; border-color: #84312a; }
.message.calm { color: #1e3a5f; background: #eef5fd; border-color: #a9c8ea; }
.dark .message.calm { color: #cfe2f8; background: #12263c; border-color: #31557c; }

/* The stage: empty, drawing, or showing a result */
.stage {
  display: flex; flex-direction: column; align-items: center; justify-content: center; gap: 14px;
  min-height: 460px; padding: 18px; text-align: center;
  background: var(--background-fill-secondary); border-radius: 12px;
}
.stage figure {
  margin: 0; width: 100%; display: flex; flex-direction: column; align-items: center; gap: 12px;
}
.stage .frame { display: block; }
.stage .frame img { display: block; width: 100%; height: auto; border-radius: 10px; }
.stage figcaption { max-width: 60ch; font-size: 14.5px; line-height: 1.45; overflow-wrap: anywhere; }
.stage .empty { color: var(--body-text-color-subdued); max-width: 34ch; line-height: 1.5; }
.stage .empty svg { display: block; margin: 0 auto 10px; opacity: 0.8; }
.stage cloud-viewer { display: block; width: 100%; max-width: 560px; }
.stage cloud-viewer canvas {
  display: block; width: 100%; aspect-ratio: 1; cursor: grab; touch-action: none; border-radius: 10px;
}
.stage cloud-viewer canvas:active { cursor: grabbing; }
.stage cloud-viewer[ready] img { display: none; }
.stage cloud-viewer img, .stage figure > img { width: 100%; height: auto; border-radius: 10px; }
.stage .film { width: min(100%, 400px); aspect-ratio: 1; border-radius: 10px; }
.actions { display: flex; flex-wrap: wrap; justify-content: center; gap: 8px; }
.progress { width: min(100%, 448px); display: flex; flex-direction: column; gap: 8px; }
.progress .words { display: flex; justify-content: space-between; gap: 12px; font-size: 14px; margin: 0; }
.progress .words span:last-child {
  color: var(--body-text-color-subdued); font-variant-numeric: tabular-nums; white-space: nowrap;
}
.progress .track { height: 8px; border-radius: 99px; overflow: hidden; background: var(--groove); }
.progress .fill { height: 100%; border-radius: 99px; background: var(--slider-color); }
.progress .fill.unknown { width: 30%; animation: wander 1.4s ease-in-out infinite alternate; }
@keyframes wander { from { margin-left: 0; } to { margin-left: 70%; } }
@media (prefers-reduced-motion: reduce) { .progress .fill.unknown { animation: none; } }

/* Tiles: the results of this run, and the history */
.tiles {
  display: grid; grid-template-columns: repeat(auto-fill, minmax(116px, 1fr)); gap: 12px;
  margin: 0; padding: 0; list-style: none;
}
.tiles li { margin: 0; padding: 0; }
.tile {
  position: relative; display: block; width: 100%; padding: 0; cursor: pointer; text-align: left;
  font: inherit; color: inherit; background: none; border: 0; border-radius: 10px;
}
.tile img {
  display: block; width: 100%; height: auto; aspect-ratio: 1; object-fit: contain; border-radius: 10px;
  background: var(--background-fill-secondary); border: 1px solid var(--border-color-primary);
}
.tile .first-view {
  display: block; overflow: hidden; aspect-ratio: 1; border-radius: 10px;
  border: 1px solid var(--border-color-primary);
}
.tile[aria-current="true"] .first-view {
  outline: 3px solid var(--border-color-accent); outline-offset: -1px;
}
.tile[aria-current="true"] .first-view img { outline: none; }
.tile .first-view img { width: 400%; max-width: none; aspect-ratio: 2; border: 0; border-radius: 0; }
.tile:hover img { border-color: var(--border-color-accent); }
.tile[aria-current="true"] img { outline: 3px solid var(--border-color-accent); outline-offset: -1px; }
.tile .badge { position: absolute; top: 6px; left: 6px; font-size: 10.5px; padding: 0 5px; }
.tile .words {
  display: -webkit-box; -webkit-line-clamp: 2; -webkit-box-orient: vertical; overflow: hidden;
  margin-top: 5px; font-size: 12.5px; line-height: 1.35; color: var(--body-text-color-subdued);
  overflow-wrap: anywhere;
}
.section-title { font-size: 16px; font-weight: 700; margin: 0; }
.beside { align-items: center !important; }

/* The recipe */
.recipe { margin-top: 8px; }
.recipe table { width: 100%; border-collapse: collapse; font-size: 14px; }
.recipe th, .recipe td {
  padding: 6px 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--border-color-primary);
}
.recipe th { width: 10.5em; padding-right: 12px; font-weight: 500; color: var(--body-text-color-subdued); }
.recipe td { overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
.recipe summary { cursor: pointer; padding: 10px 0 8px; font-size: 14px; font-weight: 600; }
.recipe pre {
  margin: 0; padding: 12px; max-height: 380px; overflow: auto; font: 12.5px/1.5 var(--font-mono);
  border-radius: 8px; white-space: pre-wrap; overflow-wrap: anywhere;
  background: var(--background-fill-secondary);
}

@media (max-width: 640px) {
  .gradio-container { padding: 0 12px 28px !important; }
  .masthead p { display: none; }
  .card { padding: 14px !important; }
  .stage { min-height: 300px; padding: 12px; }
  .studio { gap: 14px !important; }
  .pair, .pair > .form { gap: 16px !important; }
  .recipe th { width: 8em; }
}
"""

# Runs before the page is built, so that the first paint has the right colours. The theme follows the system
# until the button is pressed; the choice is kept in this browser. Gradio sets the class too: the observer has
# the last word. READY is run when the button is there.
READY = 'document.dispatchEvent(new Event("gen:ready"));'
HEAD = """
<meta name="color-scheme" content="light dark">
<script>
(() => {
  const system = matchMedia("(prefers-color-scheme: dark)");
  const dark = () => (localStorage.getItem("gen-theme") ?? (system.matches ? "dark" : "light")) === "dark";
  const apply = () => {
    if (document.body.classList.contains("dark") !== dark()) document.body.classList.toggle("dark", dark());
    document.getElementById("theme")?.setAttribute("aria-pressed", dark());
  };
  addEventListener("DOMContentLoaded", () => {
    apply();
    new MutationObserver(apply).observe(document.body, { attributes: true, attributeFilter: ["class"] });
  });
  document.addEventListener("gen:ready", apply);
  system.addEventListener("change", apply);
  document.addEventListener("click", (event) => {
    if (!event.target.closest("#theme")) return;
    const next = dark() ? "light" : "dark";
    if ((next === "dark") === system.matches) localStorage.removeItem("gen-theme");
    else localStorage.setItem("gen-theme", next);
    apply();
  });
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
    const button = document.querySelector("button.generate");
    if (!button || button.disabled) return;
    event.preventDefault();
    button.click();
  }, true);
})();
</script>
"""
