// Draws the head of the page of panels/home.py. Gradio runs this body with `element`, `props`, `watch`.
const root = element.querySelector('.home');
const kept = (key, value) => { try { if (value === undefined) return localStorage.getItem(key); localStorage.setItem(key, value); } catch { return null; } };
// Open on the first visit to a wide screen, then as the person left it.
const first = !kept('locus-visited') && window.innerWidth >= 700;
let open = (kept('locus-home') || (first ? 'open' : 'closed')) === 'open';
kept('locus-visited', 'yes');
function button(cls, text, on) {
  const b = make('button', cls, text);
  b.type = 'button'; b.addEventListener('click', on);
  return b;
}
function go(tab) {
  const t = [...document.querySelectorAll('#panels > .tab-wrapper [role=tab]')].find(t => t.textContent.trim().toLowerCase() === tab);
  if (t) { t.click(); t.scrollIntoView({block: 'start'}); }
}
function head() {
  const top = make('div', 'top'), name = make('div', 'brand');
  name.append(make('b', '', 'Locus'), ' ', make('span', '', 'where a model keeps what it knows'));
  const buttons = make('div', 'buttons');
  const fold = button('plain fold', '', () => { open = !open; kept('locus-home', open ? 'open' : 'closed'); draw(); root.querySelector('.fold').focus(); });
  fold.textContent = open ? 'Close overview' : 'Overview'; fold.setAttribute('aria-expanded', open);
  const fresh = !kept('locus-tour');
  const tour = button('plain tour' + (fresh ? ' fresh' : ''), fresh ? 'New here? Tour, 1 minute' : 'Tour', () => { kept('locus-tour', 'seen'); draw(); window.locusTour && window.locusTour(); });
  const dark = document.body.classList.contains('dark');
  const theme = button('plain theme', dark ? '☀ Light' : '☾ Dark', () => { window.locusTheme && window.locusTheme(); draw(); root.querySelector('.theme').focus(); });
  theme.title = dark ? 'Change to light colours' : 'Change to dark colours';
  buttons.append(fold, tour, theme);
  top.append(name, buttons);
  return top;
}
function row(label, ...content) {
  const r = make('div', 'row');
  r.append(make('span', 'label', label), ...content);
  return r;
}
function overview(d) {
  const box = make('div', 'overview'), cards = make('div', 'cards');
  d.panels.forEach((p, i) => {
    const c = button('card', '', () => go(p.tab));
    c.dataset.tab = p.tab;
    c.append(make('b', '', p.title), make('span', '', p.question));
    cards.append(c);
  });
  box.append(cards);
  const ready = make('span', 'text');
  d.ready.forEach((g, i) => ready.append(i ? '; ' : '', make('i', '', g.kind + ' '), g.names.join(', ')));
  box.append(row('Ready offline', ready));
  const fits = d.away ? ` ${d.fits} of ${d.away} models that can be downloaded fit. ` : ' ';
  const machine = make('span', 'text', d.machine + '.' + fits);
  machine.append(button('link', 'Models', () => go('models')));
  box.append(row('This machine', machine));
  const runs = make('span', 'text');
  d.runs.forEach(r => { const a = make('a', '', r.title); a.href = '?run=' + encodeURIComponent(r.id); a.title = r.about; runs.append(a); });
  if (!d.runs.length) runs.textContent = 'None yet. Press Run below: every run is kept, and found again under Runs.';
  box.append(row('Recent runs', runs));
  const keys = make('span', 'text');
  d.keys.forEach(([key, does], i) => keys.append(i ? ', ' : '', make('kbd', '', key), ' ' + does));
  box.append(row('Keys', keys));
  return box;
}
function draw() {
  const d = props.value;
  root.replaceChildren(head());
  if (d && d.store) {
    const told = make('span', 'text', d.store + ' ');
    told.append(button('link', 'Runs', () => go('runs')));
    root.append(row('Store', told));
  }
  if (d && d.panels && open) root.append(overview(d));
}
watch('value', draw);
new MutationObserver(draw).observe(document.body, {attributes: true, attributeFilter: ['class']});
draw();
