// A page opened from disk may not read its neighbours, which search excerpts need: search.html brings their texts along.
if (location.protocol === "file:" && location.pathname.endsWith("/search.html")) {
  document.write('<script src="_static/texts.js"></script>');
  const top = location.href.replace(/search\.html.*$/, "");
  window.fetch = async (address) => {
    const main = document.createElement("main");
    main.setAttribute("role", "main");
    main.textContent = window.pageTexts[decodeURIComponent(new URL(address, top).href.slice(top.length))] || "";
    return new Response(main.outerHTML);
  };
}
