// Draws the bars of panels/bars.py. Gradio runs this body with `element`, `props`, `trigger`, `watch`.
const root = element.querySelector('.map'), said = element.querySelector('.said');
let cur = 0, held = null;
const data = () => props.value && props.value.labels ? props.value : null;
function shown(d, i) {
  const v = d.values[i], e = d.errors[i];
  return d.labels[i] + ': ' + (v === null ? 'not measured' : v.toPrecision(3) + (e === null ? '' : ' ± ' + e.toPrecision(2)) + ' ' + d.unit);
}
function draw() {
  root.replaceChildren();
  const d = data();
  if (!d) return hint(root);
  cur = Math.min(cur, d.labels.length - 1);
  const N = d.labels.length, left = 52, right = d.lines.length ? 118 : 12, room = Math.max(280, element.clientWidth || 600) - left - right;
  const w = Math.max(14, Math.min(56, room / N)), tall = 200, top = 12, deep = 14 + 5.2 * Math.max(...d.labels.map(s => Math.min(s.length, 30)));
  const W = left + N * w + right, H = top + tall + deep;
  const finite = [0, ...d.lines.map(l => l.value), ...d.values.flatMap((v, i) => v === null ? [] : [v + (d.errors[i] || 0), v - (d.errors[i] || 0)])];
  const hi = Math.max(...finite, 1e-9), lo = Math.min(...finite), span = (hi - lo) || 1, y = v => top + tall * (hi - v) / span;
  const s = svg('svg', {width: W, height: H, viewBox: `0 0 ${W} ${H}`, role: 'presentation'});
  for (const v of [lo, 0, hi]) {
    if (v !== 0 && Math.abs(v) < 0.04 * span) continue;
    s.append(svg('text', {x: left - 6, y: y(v) + 4, 'text-anchor': 'end'}, (Math.abs(v) >= 100 ? v.toFixed(0) : v.toPrecision(2)).replace(/^-?0\.0$/, '0')));
    s.append(svg('line', {x1: left, x2: left + N * w, y1: y(v), y2: y(v), class: v === 0 ? 'axis' : 'rule'}));
  }
  for (let i = 0; i < N; i++) {
    const v = d.values[i], e = d.errors[i], x = left + i * w, name = shown(d, i);
    const chosen = held && held[0] === i && held[1] === d.labels[i];
    const g = svg('g', {class: 'cell' + (v === null ? ' waiting' : '') + (chosen ? ' chosen' : ''), 'data-row': 0, 'data-col': i, role: 'gridcell', 'aria-label': name});
    g.append(svg('rect', {x: x, y: top, width: w, height: tall, class: 'hit'}), svg('title', {}, name));
    if (v !== null) g.append(svg('rect', {x: x + 2, y: Math.min(y(v), y(0)), width: w - 4, height: Math.max(1.5, Math.abs(y(v) - y(0))), rx: 2, class: 'bar', fill: v < 0 ? d.palette.negative : d.palette.positive}));
    if (v !== null && e !== null) g.append(svg('line', {x1: x + w / 2, x2: x + w / 2, y1: y(v - e), y2: y(v + e), class: 'error'}));
    s.append(g, svg('text', {transform: `translate(${x + w / 2 + 4},${top + tall + 12}) rotate(-52)`, 'text-anchor': 'end', style: 'font-size:10px'}, d.labels[i].slice(0, 30)));
  }
  for (const l of d.lines) s.append(svg('line', {x1: left, x2: left + N * w, y1: y(l.value), y2: y(l.value), class: 'line'}),
    svg('text', {x: left + N * w + 5, y: y(l.value) + 4, style: 'font-size:10px'}, l.name.slice(0, 20)));
  s.append(svg('text', {transform: `translate(11,${top + tall / 2}) rotate(-90)`, 'text-anchor': 'middle', style: 'font-size:10px'}, d.unit.slice(0, 44)));
  root.append(s);
}
function mark(i) {
  cur = i;
  root.querySelectorAll('.cell.chosen').forEach(g => g.classList.remove('chosen'));
  const g = root.querySelector(`.cell[data-col="${i}"]`);
  if (g) { g.classList.add('chosen'); g.scrollIntoView({block: 'nearest', inline: 'nearest'}); }
  said.textContent = shown(data(), i);
}
function pick(i) { mark(i); held = [i, data().labels[i]]; trigger('select', {row: 0, col: i}); }
root.addEventListener('click', e => {
  const t = e.target.closest('.cell');
  if (t) { root.focus({preventScroll: true}); pick(+t.dataset.col); }
});
root.addEventListener('keydown', e => {
  const d = data();
  if (!d) return;
  const to = {ArrowLeft: cur - 1, ArrowRight: cur + 1, Home: 0, End: d.labels.length - 1}[e.key];
  if (to !== undefined) { if (to >= 0 && to < d.labels.length) mark(to); }
  else if ((e.key === 'Enter' && !e.ctrlKey && !e.metaKey) || e.key === ' ') pick(cur);
  else return;
  e.preventDefault();
});
watch('value', () => { said.textContent = ''; draw(); });
onWidth(draw);
draw();
