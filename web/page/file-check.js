// A classic script, since browsers refuse modules to pages that were opened as a file.
if (location.protocol === "file:") document.documentElement.classList.add("from-file");
