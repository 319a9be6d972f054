// Enlarge small images without smoothing.
for (const img of document.images) {
  const mark = () => img.classList.toggle('small', img.naturalWidth > 0 && img.naturalWidth < 128);
  img.addEventListener('load', mark);
  mark();
}
