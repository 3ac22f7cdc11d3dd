// What every drawn component starts with. Gradio runs it with `element`, `props`, `trigger`, `watch`.
function svg(tag, attrs, text) {
  const e = document.createElementNS('http://www.w3.org/2000/svg', tag);
  for (const k in attrs) e.setAttribute(k, attrs[k]);
  if (text !== undefined) e.textContent = text;
  return e;
}
function shade(palette, scale, v) {
  if (v === null) return palette.empty;
  const [low, high] = scale, limit = Math.max(Math.abs(low), Math.abs(high)), shades = palette.shades;
  const share = (Math.max(low, Math.min(high, v)) / limit + 1) / 2;
  return shades[Math.min(shades.length - 1, Math.floor(share * shades.length))];
}
function make(tag, cls, text) {
  const e = document.createElement(tag);
  if (cls) e.className = cls;
  if (text !== undefined) e.textContent = text;
  return e;
}
function hint(root) { root.append(make('div', 'empty', (props.value && props.value.hint) || 'Nothing here yet.')); }
function onWidth(draw) {
  new ResizeObserver(() => { const w = element.clientWidth; if (w && w !== element._w) { element._w = w; draw(); } }).observe(element);
}
