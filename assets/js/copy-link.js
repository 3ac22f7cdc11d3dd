id => {
  // Copies a link that opens a run, and returns it to be shown: a page without a secure address can't copy.
  if (!id) return '';
  const link = location.origin + location.pathname + '?run=' + encodeURIComponent(id);
  if (navigator.clipboard) navigator.clipboard.writeText(link).catch(() => {});
  return link;
}
