// Typesets equations. A page without any does not load KaTeX.
(() => {
  const KATEX = new URL("katex/", document.currentScript.src);
  let loading;

  function load() {
    loading ??= new Promise((resolve, reject) => {
      const style = document.createElement("link");
      style.rel = "stylesheet";
      style.href = new URL("katex.min.css", KATEX);
      const script = document.createElement("script");
      script.src = new URL("katex.min.js", KATEX);
      script.onload = resolve;
      script.onerror = reject;
      document.head.append(style, script);
    });
    return loading;
  }

  async function typeset() {
    const equations = document.querySelectorAll(".equation[data-tex]");
    if (!equations.length) return;
    await load();
    for (const equation of equations) {
      katex.render(equation.dataset.tex, equation, { displayMode: true, fleqn: true, throwOnError: false });
      equation.removeAttribute("data-tex"); // done
    }
  }

  document$.subscribe(typeset); // again for each page that is navigated to
})();
