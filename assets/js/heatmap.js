// Draws the heat map of panels/heatmap.py. Gradio runs this body with `element`, `props`, `trigger`, `watch`.
const root = element.querySelector('.map'), said = element.querySelector('.said');
let cur = [0, 0], held = null;
const data = () => props.value && props.value.rows ? props.value : null;
const colour = (d, v) => shade(d.palette, d.scale, v);
function shown(d, r, c) {
  const v = d.z[r][c];
  return (d.names[r][c] || d.rows[r] + ', ' + d.cols[c]) + ': ' + (v === null ? 'not measured' : v.toPrecision(3) + ' ' + d.unit);
}
function draw() {
  root.replaceChildren();
  const d = data();
  if (!d) return hint(root);
  cur = [Math.min(cur[0], d.rows.length - 1), Math.min(cur[1], d.cols.length - 1)];
  const R = d.rows.length, C = d.cols.length, left = 14 + 6.4 * Math.max(...d.rows.map(s => Math.min(s.length, 26)));
  const room = Math.max(280, element.clientWidth || 600) - left - 14;
  const w = Math.max(C > 60 ? 9 : 19, Math.min(64, room / C)), h = R > 40 ? 13 : R > 16 ? 18 : 30;
  const top = 10, deep = 14 + 4.6 * Math.max(...d.cols.map(s => Math.min(s.length, 22))), W = left + C * w + 10, beside = left + 174 + 5.6 * d.unit.length < W, H = top + R * h + deep + (beside ? 34 : 48);
  const s = svg('svg', {width: W, height: H, viewBox: `0 0 ${W} ${H}`, role: 'presentation'});
  const big = R * C > 10000;
  d.rows.forEach((t, r) => { if (h > 12 || r % 2 == 0) s.append(svg('text', {x: left - 6, y: top + r * h + h / 2 + 4, 'text-anchor': 'end'}, t.slice(0, 26))); });
  d.cols.forEach((t, c) => s.append(svg('text', {transform: `translate(${left + c * w + w / 2 + 4},${top + R * h + 10}) rotate(-52)`,
    'text-anchor': 'end', style: 'font-size:10px'}, t.slice(0, 22))));
  if (big) {
    const box = svg('foreignObject', {x: left, y: top, width: C * w, height: R * h}), cv = document.createElement('canvas');
    cv.width = C * w; cv.height = R * h; cv.className = 'cells';
    const g = cv.getContext('2d');
    for (let r = 0; r < R; r++) for (let c = 0; c < C; c++) { g.fillStyle = colour(d, d.z[r][c]); g.fillRect(c * w, r * h, w, h); }
    cv.addEventListener('click', e => { const b = cv.getBoundingClientRect(); pick(Math.floor((e.clientY - b.top) / h), Math.floor((e.clientX - b.left) / w)); });
    box.append(cv); s.append(box);
  } else {
    for (let r = 0; r < R; r++) for (let c = 0; c < C; c++) {
      if (!d.names[r][c]) continue;
      const v = d.z[r][c], chosen = held && held[0] === r && held[1] === c && held[2] === d.names[r][c];
      const g = svg('g', {class: 'cell' + (v === null ? ' waiting' : '') + (chosen ? ' chosen' : ''), 'data-row': r, 'data-col': c, role: 'gridcell',
        'aria-label': shown(d, r, c)});
      g.append(svg('rect', {x: left + c * w, y: top + r * h, width: w, height: h, rx: 2, fill: colour(d, v)}), svg('title', {}, shown(d, r, c)));
      s.append(g);
    }
  }
  const y = H - (beside ? 20 : 34), n = 41, [low, high] = d.scale, zero = -low / (high - low);
  for (let i = 0; i < n; i++) s.append(svg('rect', {x: left + i * 4, y: y, width: 4.2, height: 8, fill: colour(d, low + i / (n - 1) * (high - low))}));
  s.append(svg('text', {x: left, y: y + 18, style: 'font-size:9px'}, low.toPrecision(2)),
    svg('text', {x: left + 164, y: y + 18, style: 'font-size:9px', 'text-anchor': 'end'}, high.toPrecision(2)),
    svg('text', {x: beside ? left + 174 : 4, y: beside ? y + 8 : y + 31, style: 'font-size:10px'}, d.unit));
  if (zero > 0.3 && zero < 0.7) s.append(svg('text', {x: left + 164 * zero, y: y + 18, style: 'font-size:9px', 'text-anchor': 'middle'}, '0'));
  root.append(s);
  if (d.caption) {
    root.append(make('p', 'caption', d.caption));
  }
}
function mark(r, c) {
  cur = [r, c];
  root.querySelectorAll('.cell.chosen').forEach(g => g.classList.remove('chosen'));
  const g = root.querySelector(`.cell[data-row="${r}"][data-col="${c}"]`);
  if (g) { g.classList.add('chosen'); g.scrollIntoView({block: 'nearest', inline: 'nearest'}); }
  said.textContent = shown(data(), r, c);
}
function pick(r, c) { mark(r, c); held = [r, c, data().names[r][c]]; trigger('select', {row: r, col: c}); }
root.addEventListener('click', e => {
  const t = e.target.closest('.cell');
  if (t) { root.focus({preventScroll: true}); pick(+t.dataset.row, +t.dataset.col); }
});
root.addEventListener('keydown', e => {
  const d = data();
  if (!d) return;
  let [r, c] = cur;
  const R = d.rows.length, C = d.cols.length;
  const step = {ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1]}[e.key];
  if (step) {
    do { r += step[0]; c += step[1]; } while (r >= 0 && c >= 0 && r < R && c < C && !d.names[r][c]);
    if (r >= 0 && c >= 0 && r < R && c < C) mark(r, c);
  }
  else if (e.key === 'Home' && d.names[r].some(Boolean)) mark(r, d.names[r].findIndex(Boolean));
  else if (e.key === 'End' && d.names[r].some(Boolean)) mark(r, C - 1 - [...d.names[r]].reverse().findIndex(Boolean));
  else if ((e.key === 'Enter' && !e.ctrlKey && !e.metaKey) || e.key === ' ') { if (d.names[r][c]) pick(r, c); }
  else return;
  e.preventDefault();
});
watch('value', () => { said.textContent = ''; draw(); });
onWidth(draw);
draw();
