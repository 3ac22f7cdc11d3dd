// A tour of one minute: a card beside what it speaks of. Nothing is covered or blocked; Esc ends it, arrow keys go on and back.
(() => {
  const STOPS = [
    ['#home', 'Welcome', 'Locus asks where a model keeps what it knows. Each panel answers one question. Small models are built in, so everything works offline, right now.'],
    ['#panels > .tab-wrapper', 'One tab, one question', 'Trace and Localize look for a place, Edit changes it, Decompose opens vision models, Retrieval language models. Runs keeps everything; Models says what fits this machine.'],
    ['#trace-prompt', 'Say what to look at', 'An example is in place. The prompt makes an image; the subject is the part of it that is damaged and then restored, piece by piece.'],
    ['#trace-run', 'Run', 'Press it, or Ctrl+Enter. Stop, or Esc, ends a run within a step and keeps what was measured.'],
    ['#trace-figure', 'Read the map', 'Cells fill in while you watch: how much of the image each part brings back. Click a cell, or use the arrow keys and Enter, to see the images behind its number.'],
    ['#trace-export, #trace-detail', 'Take it with you', 'After a run, its figure, numbers and recipe can be saved here. Drop such a file on Runs and the run comes back.'],
    ['#panels > .tab-wrapper', 'What it cannot show', 'Every panel has a page on what its numbers mean and what they cannot show. Read it before you believe a map. That is all; the tour starts again from the top of the page.'],
  ];
  let at = -1, card = null, from = null;
  const el = (tag, cls, text) => { const e = document.createElement(tag); if (cls) e.className = cls; if (text) e.textContent = text; return e; };
  const shownOf = query => [...document.querySelectorAll(query)].find(e => e.offsetParent !== null);
  function place() {
    document.querySelectorAll('.tour-target').forEach(e => e.classList.remove('tour-target'));
    const target = shownOf(STOPS[at][0]);
    const narrow = window.innerWidth < 700;  // there the card stays at the bottom
    Object.assign(card.style, narrow ? {top: 'auto', left: '8px', right: '8px', bottom: '8px', width: 'auto'} : {top: '', left: '', right: '', bottom: '', width: ''});
    if (!target) return;
    target.classList.add('tour-target');
    target.scrollIntoView({block: narrow ? 'start' : 'center'});
    if (narrow) return;
    const b = target.getBoundingClientRect(), w = card.offsetWidth, h = card.offsetHeight;
    const under = b.bottom + 10 + h < window.innerHeight, over = b.top - 10 - h > 0;
    card.style.top = Math.max(8, under ? b.bottom + 10 : over ? b.top - 10 - h : window.innerHeight - h - 12) + 'px';
    card.style.left = Math.max(8, Math.min(window.innerWidth - w - 12, under || over ? b.left : b.right - w)) + 'px';
  }
  function show(n) {
    if (n < 0) return;
    if (n >= STOPS.length) return end();
    at = n;
    const [, title, text] = STOPS[n], last = n === STOPS.length - 1;
    card.replaceChildren();
    const words = el('div', 'words');
    words.setAttribute('aria-live', 'polite');
    words.append(el('b', '', title), el('p', '', text));
    const row = el('div', 'steps'), next = el('button', 'next', last ? 'Done' : 'Next'), back = el('button', '', 'Back'), skip = el('button', 'skip', 'Skip');
    [next, back, skip].forEach(b => { b.type = 'button'; });
    next.onclick = () => show(at + 1); back.onclick = () => show(at - 1); skip.onclick = end;
    back.disabled = n === 0;
    row.append(el('span', 'count', `${n + 1} of ${STOPS.length}`), ...(last ? [] : [skip]), back, next);
    card.append(words, row);
    place();
    next.focus({preventScroll: true});
  }
  function end() {
    if (!card) return;
    document.querySelectorAll('.tour-target').forEach(e => e.classList.remove('tour-target'));
    card.remove();
    card = null; at = -1;
    const button = document.querySelector('.home .tour');
    if (button) button.focus({preventScroll: true});
  }
  function keys(e) {
    if (!card) return;
    const step = {ArrowRight: 1, ArrowLeft: -1}[e.key];
    if (e.key === 'Escape') end();
    else if (step && card.contains(document.activeElement)) show(at + step);
    else return;
    e.preventDefault(); e.stopPropagation();
  }
  window.locusTour = () => {
    end();
    const first = document.querySelector('#panels > .tab-wrapper [role=tab]');
    if (first) first.click();
    card = el('div', 'tour-card');
    card.setAttribute('role', 'dialog'); card.setAttribute('aria-modal', 'false'); card.setAttribute('aria-label', 'Tour');
    (document.querySelector('.gradio-container') || document.body).append(card);
    show(0);
  };
  document.addEventListener('keydown', keys, true);
  window.addEventListener('resize', () => { if (card) place(); });
})();
