// Draws the grid of panels/picture_grid.py. Gradio runs this body with `element`, `props`, `trigger`, `watch`.
const root = element.querySelector('.map'), said = element.querySelector('.said');
let cur = [0, 0], held = '';
const data = () => props.value && props.value.pictures ? props.value : null;
const name = (r, c) => (data().names[r] || [])[c] || '';
function draw() {
  root.replaceChildren();
  const d = data();
  if (!d) return hint(root);
  cur = [Math.min(cur[0], d.rows.length - 1), Math.min(cur[1], d.cols.length - 1)];
  const grid = make('div', 'pictures');
  grid.style.gridTemplateColumns = `fit-content(130px) repeat(${d.cols.length}, minmax(64px, 160px))`;
  grid.append(make('div', 'head row', d.title), ...d.cols.map(text => make('div', 'head col', text)));
  d.rows.forEach((text, r) => {
    grid.append(make('div', 'head row', text));
    d.pictures[r].forEach((address, c) => {
      const cell = make('div', name(r, c) ? 'cell' : 'none');
      if (name(r, c)) {
        cell.dataset.row = r; cell.dataset.col = c;
        cell.setAttribute('role', 'gridcell');
        cell.setAttribute('aria-label', name(r, c));
        cell.title = name(r, c);
        if (held === name(r, c)) cell.classList.add('chosen');
        const img = make('img');
        img.alt = name(r, c);
        img.onload = () => img.classList.toggle('small', img.naturalWidth < 128);
        img.src = address;
        cell.append(img);
      }
      grid.append(cell);
    });
  });
  root.append(grid);
}
function mark(r, c) {
  cur = [r, c];
  root.querySelectorAll('.cell').forEach(e => e.classList.toggle('chosen', +e.dataset.row === r && +e.dataset.col === c));
  const e = root.querySelector('.cell.chosen');
  if (e) e.scrollIntoView({block: 'nearest', inline: 'nearest'});
  said.textContent = name(r, c);
}
function next(step) {  // where nothing lies that way: on in reading order
  const d = data(), C = d.cols.length;
  for (let i = cur[0] * C + cur[1] + step; i >= 0 && i < d.rows.length * C; i += step)
    if (name(Math.floor(i / C), i % C)) return mark(Math.floor(i / C), i % C);
}
function pick(r, c) { mark(r, c); held = name(r, c); trigger('select', {row: r, col: c}); }
root.addEventListener('click', e => {
  const t = e.target.closest('.cell');
  if (t) { root.focus({preventScroll: true}); pick(+t.dataset.row, +t.dataset.col); }
});
root.addEventListener('keydown', e => {
  const d = data();
  if (!d) return;
  let [r, c] = cur;
  const R = d.rows.length, C = d.cols.length, whole = [...Array(C).keys()].filter(i => name(r, i));
  const step = {ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1]}[e.key];
  if (step) {
    do { r += step[0]; c += step[1]; } while (r >= 0 && c >= 0 && r < R && c < C && !name(r, c));
    if (r >= 0 && c >= 0 && r < R && c < C) mark(r, c);
    else next(step[0] + step[1]);
  }
  else if (e.key === 'Home' || e.key === 'End') { if (whole.length) mark(r, whole.at(e.key === 'Home' ? 0 : -1)); }
  else if ((e.key === 'Enter' && !e.ctrlKey && !e.metaKey) || e.key === ' ') { if (name(r, c)) pick(r, c); }
  else return;
  e.preventDefault();
});
watch('value', () => { said.textContent = ''; held = ''; draw(); });
draw();
