"""Equations in docstrings are translated to the TeX that they mean, or stay as they are."""

from __future__ import annotations

import html
import importlib
import re
import sys
from pathlib import Path

import pytest

from regard import list_mechanisms
from regard.catalogue import get_module

DOCS = Path(__file__).parents[2] / "docs"
KATEX = DOCS / "assets" / "katex"


sys.path.append(str(DOCS))
equations = importlib.import_module("equations")


@pytest.mark.parametrize(
    ("text", "tex"),
    [
        # scripts and accents
        ("y_j = x_{j+1}^2", r"y_j = x^2_{j + 1}"),
        ("M_pq = W_out A_3", r"M_{pq} = W_{\mathrm{out}} A_3"),
        ("x = g_r2 h_iB", r"x = g_{r2} h_{iB}"),
        ("B = C^T D^+ n^-3/4 c^-0.25", r"B = C^\top D^+ n^{-3/4} c^{-0.25}"),
        ("u^a_m = e^(-|t| / h) 7^{r s}", r"u^a_m = e^{- \lvert t \rvert / h} \,7^{r s}"),
        ("p' = q~_t r^_t s~^T v'_n^T", r"p' = \tilde{q}_t \hat{r}_t \tilde{s}^\top v'^\top_n"),
        ("f = (g h)_n^T", r"f = (g h)^\top_n"),
        # names
        ("omega = -inf + eps", r"\omega = - \infty + \varepsilon"),
        ("Psi_mu = dt_m a", r"\Psi_\mu = \operatorname{dt}_m a"),
        # functions and sums
        ("y = log sum_{i<=n} exp(z_i)", r"y = \log \sum_{i \le n} \exp (z_i)"),
        ("y = max_k min(z_k, 1)", r"y = \max_k \min (z_k , 1)"),
        ("y = softmax_k(z)_k + gelu(b)", r"y = \operatorname{softmax}_k (z)_k + \operatorname{gelu} (b)"),
        ("y = sqrt(n) floor(n / 2) ceil(m)", r"y = \sqrt{n} \lfloor n / 2 \rfloor \lceil m \rceil"),
        ("k = i mod n", r"k = i \bmod n"),
        ("L = MSE + KL(a, b)", r"L = \mathrm{MSE} + \operatorname{KL} (a , b)"),
        # products, fractions, numbers
        ("a = b . c + D * E", r"a = b \cdot c + D \odot E"),
        ("a = 2 b / (c + 1)", r"a = \frac{2 b}{c + 1}"),
        ("a = (b + c) / (d)", r"a = \frac{b + c}{d}"),
        ("a = ((b) / (c) + 1)^2", r"a = \left(\frac{b}{c} + 1\right)^2"),
        ("a = b . c / (d) - sum_i e / (f)", r"a = b \cdot c / (d) - \sum_i e / (f)"),
        ("a = b / c + 1e-9", r"a = b / c + 10^{-9}"),
        ("a = c 100^{-x}", r"a = c \,100^{- x}"),
        # brackets
        ("a = <x_i, y> / ||z||_2", r"a = \langle x_i , y \rangle / \lVert z \rVert_2"),
        ("a = |b| |c - |d| |", r"a = \lvert b \rvert \lvert c - \lvert d \rvert \rvert"),
        ("g in (0, 1]^K", r"g \in (0 , 1]^K"),
        ("U = { n : n < m }", r"U = \{n : n < m\}"),
        ("a = b_{c[:n]}", r"a = b_{c [{:} n]}"),
        ("a = [b; c, ..., d]", r"a = [b ; c , \dots , d]"),
        # relations
        ("a <- b", r"a \leftarrow b"),
        ("0 <= i < n != m", r"0 \le i < n \ne m"),
        ("w ~ N(0, I)", r"w \sim N (0 , I)"),
        # words
        ("a = mean of b over all keys", r"a = \text{mean of } b \text{ over all keys}"),
        ("a = b for i in T, else -1", r"a = b \text{ for } i \in T , \text{ else } - 1"),
        ("a = b for keys in the block", r"a = b \text{ for keys in the block}"),
        ("layer: y = a (with bias)", r"\text{layer: } y = a \ (\text{with bias})"),
        ("a = b with `my_option`", r"a = b \text{ with \texttt{my\_option}}"),
        ("a = b,    c = d", r"a = b , \qquad c = d"),
        ("a    = b", "a = b"),
    ],
)
def test_a_line_means(text, tex):
    assert equations.equation(text) == tex


@pytest.mark.parametrize(
    ("text", "tex"),
    [
        ("a   = b\nc_d = e", ["a & = b", "c_d & = e"]),
        ("a = b\n  = c", ["a & = b", "& = c"]),
        ("a = b\n    c d", ["a & = b", r"& \quad c d"]),
        ("a = b,    c = d\ne = f,    g = h", ["a & = b , & c & = d", "e & = f , & g & = h"]),
        ("a = b     for keys\nc = d,    e = f,   h = i", [r"a & = b \qquad \text{for keys}", "c & = d , \\qquad e = f , \\qquad h = i"]),
        ("keys over which a = b\nc = d", [r"& \text{keys over which } a = b", "& c = d"]),
    ],
)  # fmt: skip
def test_lines_are_aligned(text, tex):
    assert equations.equation(text) == "\\begin{aligned}\n" + " \\\\\n".join(tex) + "\n\\end{aligned}"


def test_a_long_line_is_broken_between_equations():
    sum_of_many = " + ".join("abcdefghijklmnop")
    assert equations.equation(f"x = {sum_of_many},   y = z,   w = {sum_of_many}").splitlines()[1:-1] == [
        rf"x & = {sum_of_many} , \qquad y = z , \\",
        f"w & = {sum_of_many}",
    ]


REFUSED = {
    "no known word": "y = frobnicate(x) ;; y = xyz ;; y = B1",
    "no part of the notation": "y = 'a' ;; y = a ** b ;; y == a ;; y = a -- b ;; y += a",
    "says nothing": "a, b, c ;;  ;; over all keys ;; y = a\nfor all keys ;; y = a\n\nz = b ;;   y = a\nz = b ;; y = a\n= b",
    "brackets": "y = (a ;; y = a) ;; y = (a] ;; y = () ;; y = |a ;; y = a<b, c> ;; y = floor(a]",
    "something is missing": "y = a + ;; y = / a ;; y = (a, ) ;; = a ;; y = sqrt() ;; y = sum_j ;; y = a^- ;; y = a_ ;; y = a^",
    "two readings": "y = x_t-1 ;; y = x_i,j ;; y = x^2/3 ;; y = x^n(a) ;; y = x^n( a) ;; y = x_in ;; Y = W_it ;; y = a_b_c",
    "no quantity": "y = 2 3 ;; y = 3e4 ;; y = a of 3 x 3 ;; y = a -b ;; y = a. ;; y = a* b ;; y = b for a key",
}


@pytest.mark.parametrize("text", [text for texts in REFUSED.values() for text in re.split(" ;; ?", texts)])
def test_what_is_not_understood_is_refused(text):
    with pytest.raises(equations.Refused):
        equations.equation(text)


BLOCKS = [block for name in list_mechanisms() for block in equations.indented_blocks(get_module(name).__doc__)]
COMMANDS = {"{", "}", "\\", ",", ";", "_", " ", *equations.GREEK, *equations.COMMANDS} | set(
    re.findall(
        r"\w+",
        """begin end text texttt operatorname mathrm tilde hat frac sqrt left right lvert rvert lVert rVert langle rangle
        lfloor rfloor lceil rceil cdot odot bmod dots infty varepsilon top colon in le ge ne leftarrow to sim approx
        quad qquad""",
    )
)
"""Everything that may follow a backslash."""


def typeset(blocks):
    for block in blocks:
        try:
            yield equations.equation(block)
        except equations.Refused:
            continue


def test_the_equations_of_the_mechanisms_are_typeset():
    shown = list(typeset(BLOCKS))
    assert len(shown) >= 0.95 * len(BLOCKS) > 60, "python docs/equations.py regard/mechanisms/*.py says what is not"
    for tex in shown:
        found = re.findall(r"\\([A-Za-z]+|.)", tex, re.DOTALL)
        assert set(found) <= COMMANDS, set(found) - COMMANDS
        depth = 0
        for brace in re.findall(r"(?<!\\)[{}]", tex):
            depth += 1 if brace == "{" else -1
            assert depth >= 0
        assert depth == 0
        assert found.count("left") == found.count("right")
        assert found.count("begin") == found.count("end") == tex.count(r"{aligned}") / 2
        assert "&" not in tex or tex.startswith(r"\begin{aligned}")


def test_pages_keep_the_text_of_equations_and_the_code():
    markdown = pytest.importorskip("markdown")
    extension = importlib.import_module("typeset").EquationsExtension()
    page = "With\n\n    a_i = <b_i, c> & d\n\nand\n\n    a_i = <b_i, c>\n\nand\n\n    x = y\n\n    print(x)\n"
    shown = markdown.markdown(page, extensions=[extension])
    assert shown.count('class="equation"') == 1
    assert 'data-tex="a_i = \\langle b_i , c \\rangle"' in shown
    assert "<pre>a_i = &lt;b_i, c&gt;</pre>" in shown
    codes = [html.unescape(code) for code in re.findall(r"<pre><code>(.*?)</code></pre>", shown, re.DOTALL)]
    assert codes == ["a_i = <b_i, c> & d\n", "x = y\n\nprint(x)\n"]


@pytest.mark.skipif(not KATEX.is_dir(), reason="an archive of the sources has no KaTeX")
def test_pages_load_nothing_from_elsewhere():
    style = (KATEX / "katex.min.css").read_text()
    assert set(re.findall(r"url\((.*?)\)", style)) == {f"fonts/{font.name}" for font in (KATEX / "fonts").iterdir()}
    assert all(font.suffix == ".woff2" for font in (KATEX / "fonts").iterdir())
    assert "http" not in style + (DOCS / "assets" / "equations.js").read_text()
