"""The viewer of clouds in the page: the element <cloud-viewer src label>, drawn on a plain canvas.

Not WebGL, which machines without a graphics driver lack, and nothing from elsewhere: some thousand balls are
painted from the back to the front in a few milliseconds. It reads the PLY files of gen.point_files. What
stands inside the element, a picture, is seen until the cloud is there, and for good where scripts are not.
"""

HEAD = """
<script>
(() => {
  if (customElements.get("cloud-viewer")) return;
  const START = -0.61, TILT = 0.38, KEY_TURN = 0.15, NEAREST = 0.4, FARTHEST = 4;
  const BYTES = { char: 1, uchar: 1, short: 2, ushort: 2, int: 4, uint: 4, float: 4, double: 8 };

  // Rows of "x y z red green blue" from a binary little-endian PLY, as big as a ball of radius 1.
  function read(buffer) {
    const text = new TextDecoder("latin1").decode(buffer.slice(0, 1 << 22));
    const end = text.indexOf("end_header\\n");
    if (end < 0 || !text.includes("format binary_little_endian")) throw new Error("no PLY");
    const count = Number(/^element vertex (\\d+)$/m.exec(text)[1]);
    const at = {};
    let stride = 0;
    for (const [, type, name] of text.slice(0, end).matchAll(/^property (\\w+) (\\w+)$/gm)) {
      at[name] = stride;
      stride += BYTES[type];
    }
    const view = new DataView(buffer, end + 11);
    const points = new Float32Array(3 * count), colours = new Uint8Array(3 * count);
    const low = [Infinity, Infinity, Infinity], high = [-Infinity, -Infinity, -Infinity];
    for (let p = 0; p < count; p++) {
      ["x", "y", "z"].forEach((axis, k) => {
        const value = view.getFloat32(p * stride + at[axis], true);
        points[3 * p + k] = value;
        low[k] = Math.min(low[k], value);
        high[k] = Math.max(high[k], value);
      });
      ["red", "green", "blue"].forEach((name, k) => {
        colours[3 * p + k] = view.getUint8(p * stride + at[name]);
      });
    }
    const middle = low.map((value, k) => (value + high[k]) / 2);
    let reach = 1e-9;
    for (let p = 0; p < count; p++) {
      reach = Math.max(reach, Math.hypot(...middle.map((value, k) => points[3 * p + k] - value)));
    }
    for (let n = 0; n < points.length; n++) points[n] = (points[n] - middle[n % 3]) / reach;
    return { count, points, colours };
  }

  // A shaded ball of this colour on a canvas of its own.
  function ball(colour, size) {
    const canvas = document.createElement("canvas");
    canvas.width = canvas.height = size;
    const context = canvas.getContext("2d"), half = size / 2;
    const light = context.createRadialGradient(0.7 * half, 0.6 * half, 0, half, half, half);
    const mix = (share, other) => `rgb(${colour.map((one) => one + (other - one) * share).join(" ")})`;
    light.addColorStop(0, mix(0.45, 255));
    light.addColorStop(0.45, mix(0, 0));
    light.addColorStop(1, mix(0.5, 20));
    context.fillStyle = light;
    context.beginPath();
    context.arc(half, half, half, 0, 7);
    context.fill();
    return canvas;
  }

  customElements.define("cloud-viewer", class extends HTMLElement {
    async connectedCallback() {
      if (this.canvas) return;
      this.turn = START;
      this.tilt = TILT;
      this.zoom = 1;
      try {
        const answer = await fetch(this.getAttribute("src"));
        if (!answer.ok) throw new Error(answer.statusText);
        this.cloud = read(await answer.arrayBuffer());
      } catch (error) {
        this.title = `The cloud cannot be shown (${error.message}); the picture can.`;
        return;
      }
      if (!this.isConnected) return;
      this.canvas = document.createElement("canvas");
      this.canvas.tabIndex = 0;
      this.canvas.setAttribute("role", "img");
      this.canvas.setAttribute("aria-label", this.getAttribute("label") ?? "");
      this.append(this.canvas);
      this.setAttribute("ready", "");
      this.balls = new Map();
      this.listen();
      new ResizeObserver(() => this.ask()).observe(this.canvas);
    }

    listen() {
      const held = new Map();  // pointer -> where it is
      this.canvas.addEventListener("pointerdown", (event) => {
        this.canvas.setPointerCapture(event.pointerId);
        held.set(event.pointerId, [event.clientX, event.clientY]);
      });
      this.canvas.addEventListener("pointermove", (event) => {
        const before = held.get(event.pointerId);
        if (!before) return;
        const now = [event.clientX, event.clientY];
        const side = this.canvas.clientWidth;
        if (held.size === 2) {
          const [, other] = [...held].find(([id]) => id !== event.pointerId);
          const apart = (spot) => Math.hypot(spot[0] - other[0], spot[1] - other[1]) || 1;
          this.come(apart(now) / apart(before));
        } else {
          this.go(4 * (now[0] - before[0]) / side, 4 * (now[1] - before[1]) / side);
        }
        held.set(event.pointerId, now);
      });
      for (const name of ["pointerup", "pointercancel"]) {
        this.canvas.addEventListener(name, (event) => held.delete(event.pointerId));
      }
      this.canvas.addEventListener("wheel", (event) => {
        if (!event.ctrlKey && document.activeElement !== this.canvas) return;  // the page scrolls on
        event.preventDefault();
        this.come(Math.exp(-event.deltaY / 600));
      }, { passive: false });
      this.canvas.addEventListener("keydown", (event) => {
        const turns = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
        const zooms = { "+": 1.15, "=": 1.15, "-": 1 / 1.15 };
        if (turns[event.key]) this.go(...turns[event.key].map((way) => way * KEY_TURN));
        else if (zooms[event.key]) this.come(zooms[event.key]);
        else return;
        event.preventDefault();
      });
      this.canvas.addEventListener("dblclick", () => {
        [this.turn, this.tilt, this.zoom] = [START, TILT, 1];
        this.ask();
      });
    }

    go(turn, tilt) {
      this.turn += turn;
      this.tilt = Math.max(-1.5, Math.min(1.5, this.tilt + tilt));
      this.ask();
    }

    come(times) {
      this.zoom = Math.max(NEAREST, Math.min(FARTHEST, this.zoom * times));
      this.ask();
    }

    ask() {
      if (this.asked) return;
      this.asked = true;
      requestAnimationFrame(() => {
        this.asked = false;
        this.draw();
      });
    }

    ballOf(p, size, near) {
      // Colours in steps of 8, sizes in steps of 2 and six depths keep the number of balls small.
      const { colours } = this.cloud;
      const light = 0.55 + 0.09 * Math.round(5 * Math.max(0, Math.min(1, (near + 0.8) / 1.6)));
      const [r, g, b] = [0, 1, 2].map((k) => light * (colours[3 * p + k] & 248) + 4 & 255);
      const rounded = Math.max(2, 2 * Math.round(size / 2)), key = [rounded, r, g, b].join();
      let found = this.balls.get(key);
      if (!found) {
        if (this.balls.size > 4000) this.balls.clear();
        found = ball([r, g, b], rounded);
        this.balls.set(key, found);
      }
      return found;
    }

    draw() {
      const side = Math.round(this.canvas.clientWidth * Math.min(2, devicePixelRatio || 1));
      if (!side) return;
      if (this.canvas.width !== side) this.canvas.width = this.canvas.height = side;
      const context = this.canvas.getContext("2d"), { count, points } = this.cloud;
      context.clearRect(0, 0, side, side);
      const [s, c] = [Math.sin(this.turn), Math.cos(this.turn)];
      const [u, v] = [Math.sin(this.tilt), Math.cos(this.tilt)];
      const near = new Float32Array(count), across = new Float32Array(count), up = new Float32Array(count);
      const order = new Uint32Array(count);
      for (let p = 0; p < count; p++) {
        const x = points[3 * p], y = points[3 * p + 1], z = points[3 * p + 2];
        const back = c * z - s * x;
        across[p] = c * x + s * z;
        up[p] = v * y - u * back;
        near[p] = u * y + v * back;
        order[p] = p;
      }
      order.sort((a, b) => near[a] - near[b]);
      const scale = 0.47 * side * this.zoom, size = 2.6 * scale / Math.sqrt(count);
      for (const p of order) {
        const closer = 4 / (4 - near[p]);
        const wide = Math.max(2, size * closer);
        const x = side / 2 + scale * across[p] * closer, y = side / 2 - scale * up[p] * closer;
        context.drawImage(this.ballOf(p, wide, near[p]), x - wide / 2, y - wide / 2, wide, wide);
      }
    }
  });
})();
</script>
"""
