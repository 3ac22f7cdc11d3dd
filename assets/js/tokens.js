// Draws the token strip of panels/token_strip.py. Gradio runs this body with `element`, `props`, `trigger`, `watch`.
const root = element.querySelector('.map'), said = element.querySelector('.said');
let cur = 0, from = null, held = false, late = false;
const data = () => props.value && props.value.tokens ? props.value : null;
const spans = () => root.querySelectorAll('.token');
function shown(d, i) {
  const v = d.values[i];
  return `${i}: ${d.tokens[i].label}` + (v === null ? '' : `: ${v.toPrecision(3)} ${d.unit}`);
}
function draw() {
  root.replaceChildren();
  const d = data();
  if (!d) return hint(root);
  cur = Math.min(cur, d.tokens.length - 1);
  d.tokens.forEach((t, i) => {
    if (t.before) root.append(document.createTextNode(t.before));
    const e = make('span', 'token' + t.roles.map(r => ' role-' + r).join(''), t.text), v = d.values[i];
    e.dataset.i = i;
    e.title = shown(d, i) + (t.roles.length ? ` (${t.roles.join(', ')})` : '');
    if (v !== null && d.scale) {
      const [low, high] = d.scale, limit = Math.max(Math.abs(low), Math.abs(high));
      e.style.background = shade(d.palette, d.scale, v);
      e.style.color = Math.abs(Math.max(low, Math.min(high, v))) > 0.6 * limit ? '#fff' : '#111';
    }
    root.append(e);
  });
  if (d.caption) root.append(make('p', 'caption', d.caption));
}
function mark(i) {
  cur = i;
  spans().forEach((e, k) => {
    e.classList.toggle('chosen', k === i);
    e.classList.toggle('picked', from !== null && k >= Math.min(from, i) && k <= Math.max(from, i));
  });
  said.textContent = shown(data(), i);
}
function send(a, b) {
  trigger('select', {first: Math.min(a, b), last: Math.max(a, b), range: from !== null, text: data().text});
}
const at = node => { const e = (node.nodeType === 3 ? node.parentElement : node).closest('.token'); return e && root.contains(e) ? +e.dataset.i : null; };
root.addEventListener('mouseup', () => {
  const chosen = window.getSelection();
  if (!data() || !chosen || !chosen.rangeCount) return;
  const ends = [at(chosen.anchorNode), at(chosen.focusNode)];
  if (ends[0] === null || ends[1] === null) return;
  from = chosen.isCollapsed ? null : ends[0];
  mark(ends[1]);
  send(ends[0], ends[1]);
});
root.addEventListener('keydown', e => {
  const d = data(), step = {ArrowLeft: -1, ArrowRight: 1, ArrowUp: -8, ArrowDown: 8}[e.key];
  if (!d) return;
  if (step) {
    from = e.shiftKey ? (from === null ? cur : from) : null;
    mark(Math.max(0, Math.min(d.tokens.length - 1, cur + step)));
  } else if (e.key === 'Home' || e.key === 'End') mark(e.key === 'Home' ? 0 : d.tokens.length - 1);
  else if ((e.key === 'Enter' && !e.ctrlKey && !e.metaKey) || e.key === ' ') send(from === null ? cur : from, cur);
  else return;
  e.preventDefault();
});
function redraw() { said.textContent = ''; from = null; draw(); }
root.addEventListener('mousedown', () => { held = true; });
window.addEventListener('mouseup', () => {  // after the strip's own listener
  held = false;
  if (late) { late = false; redraw(); }
});
watch('value', () => { if (held) late = true; else redraw(); });  // words that are being selected stay there
draw();
