"""The templates of report.html: style, page, and the parts that sections are made of. html.py says what was chosen."""

STYLE = """
:root { color-scheme: light dark; --text: #1f2328; --dim: #59636e; --page: #ffffff; --card: #f6f8fa; --line: #d1d9e0;
  --accent: #0b62c4; }
@media (prefers-color-scheme: dark) { :root { --text: #e6e8eb; --dim: #9aa4af; --page: #12161b; --card: #1b2128;
  --line: #343c46; --accent: #6cb0ff; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; scroll-behavior: smooth; }
body { margin: 0 auto; max-width: 62rem; padding: 1.5rem 1.25rem 3rem; background: var(--page); color: var(--text);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 .5rem; letter-spacing: -.01em; }
h2 { font-size: 1.25rem; margin: 2.75rem 0 .75rem; padding-bottom: .3rem; border-bottom: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1rem 0 .25rem; }
a { color: var(--accent); }
p { max-width: 46rem; margin: .6rem 0; }
.dim, footer, nav, caption, figcaption { color: var(--dim); }
nav ul { display: flex; flex-wrap: wrap; gap: .15rem 1.1rem; list-style: none; padding: 0; margin: 1rem 0 0; }
.scroll { overflow-x: auto; margin: .75rem 0; border: 1px solid var(--line); border-radius: .5rem; }
.tall { max-height: 32rem; overflow-y: auto; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding: .6rem .75rem 0; font-size: .85rem; }
th, td { padding: .42rem .75rem; text-align: left; white-space: nowrap; vertical-align: baseline; }
thead th { color: var(--dim); font-weight: 600; vertical-align: bottom; border-bottom: 1px solid var(--line);
  white-space: normal; }
.tall thead th { position: sticky; top: 0; background: var(--page); box-shadow: 0 1px var(--line); }
tbody tr + tr > * { border-top: 1px solid var(--line); }
tbody th { font-weight: 600; }
.number { text-align: right; }
.notes { font-size: .85rem; color: var(--dim); margin: .35rem 0; }
ul.reading { max-width: 46rem; padding-left: 1.2rem; }
figure { margin: 1.5rem 0; }
figcaption { font-size: .9rem; margin-bottom: .4rem; max-width: 46rem; }
figure svg { display: block; width: 100%; max-width: 50rem; height: auto; }
figure .scroll { border: 0; }
@media (max-width: 40rem) { body { padding: 1rem .9rem 2rem; } figure svg { width: 36rem; } h1 { font-size: 1.45rem; }
  th, td { padding: .4rem .6rem; } }
article { margin: 1rem 0; padding: .8rem 1rem; background: var(--card); border-radius: .5rem; }
article > p { margin: 0 0 .6rem; max-width: none; }
article .source { font-weight: 600; }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(15rem, 100%), 1fr)); margin: 0;
  gap: .75rem 1.25rem; }
dt { font-size: .8rem; color: var(--dim); }
dd { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; max-height: 11rem; overflow-y: auto; }
dd .rest { color: var(--dim); font-style: italic; }
pre { margin: 0; padding: .8rem 1rem; font: .82rem/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
footer { margin-top: 3rem; padding-top: .75rem; border-top: 1px solid var(--line); font-size: .85rem; }
@media print { :root { --text: #000; --dim: #444; --page: #fff; --card: #fff; --line: #bbb; --accent: #000; }
  body { max-width: none; padding: 0; font-size: 9.5pt; } nav { display: none; } h2 { break-after: avoid; }
  figure, article, tr { break-inside: avoid; } article { border: 1px solid var(--line); }
  .scroll, .tall, dd { overflow: visible; max-height: none; } table { font-size: 8pt; }
  th, td { padding: .2rem .35rem; } thead th, tbody th { white-space: normal; } figure svg { max-width: 100%; }
  pre { white-space: pre-wrap; font-size: 7.5pt; } }
""".strip()

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>{{ title }}</title>
<style>
{{ style }}
</style>
</head>
<body>
<header>
<h1>{{ title }}</h1>
{% if summary %}<p>{{ summary }}</p>{% endif %}

<nav aria-label="Contents"><ul>
{% for anchor, name, _ in parts %}
<li><a href="#{{ anchor }}">{{ name }}</a></li>
{% endfor %}
</ul></nav>
</header>
<main>
{% for anchor, name, body in parts %}
<section aria-labelledby="{{ anchor }}">
<h2 id="{{ anchor }}">{{ name }}</h2>
{{ body }}
</section>
{% endfor %}
</main>
<footer>Written by ksl_ds {{ version }}, {{ written }}. This file is complete: it makes no request.</footer>
</body>
</html>"""

PARTS = """
{% macro table(content, tall) %}
<div class="scroll{{ ' tall' if tall }}" tabindex="0" role="region" aria-label="{{ content.title }}">
<table>
<caption>{{ content.title }}</caption>
{% if content.columns | map(attribute="name") | select | list %}
<thead><tr>
{% for column in content.columns %}
<th scope="col"{{ kind(column) }}>{{ column.name | replace("-", "\u2011") }}</th>
{% endfor %}
</tr></thead>
{% endif %}
<tbody>
{% for row in content.rows %}
<tr>
{%- for column in content.columns %}
{% if loop.first %}
<th scope="row"{{ kind(column) }}>{{ row[0] }}</th>
{%- else %}
<td{{ kind(column) }}>{{ row[loop.index0] }}</td>
{%- endif %}
{% endfor %}
</tr>
{% endfor %}
</tbody>
</table>
</div>
{% for note in content.notes %}
<p class="notes">{{ note }}</p>
{% endfor %}
{% endmacro %}

{% macro kind(column) %}{% if column.numeric %} class="number"{% endif %}{% endmacro %}

{% macro figure(caption, svg) %}
<figure>
<figcaption>{{ caption }}</figcaption>
<div class="scroll" tabindex="0" role="group" aria-label="{{ caption }}">
{{ svg }}
</div>
</figure>
{% endmacro %}

{% macro paragraphs(texts) %}
{% for text in texts %}
<p>{{ text }}</p>
{% endfor %}
{% endmacro %}

{% macro bullets(texts) %}
<ul class="reading">
{% for text in texts %}
<li>{{ text }}</li>
{% endfor %}
</ul>
{% endmacro %}

{% macro reading(sentences, notes) %}
<h3>How to read it</h3>
<ul class="reading">
<li>Test loss is measured on the reference translations and does not depend on decoding. Look at it first.</li>
<li>An untuned model often translates and then goes on writing. A method that only teaches it to stop raises BLEU and
chrF++ a lot; the first-line score and the stop rate show how much of a gain is that.</li>
<li>Copying the source is a baseline: names, numbers and shared words alone earn its scores.</li>
<li>This is one run with one seed. Small differences between rows may be chance.</li>
</ul>
{% if sentences or notes %}
<h3>In this run</h3>
{{ bullets(sentences + notes) }}
{% endif %}
{% endmacro %}

{% macro ticket() %}
<p class="notes">Before and after are paired, not independent, samples, so p and alpha are nominal. The test sees which
values a row holds, not their order, and it favours rows of small norm and frequent tokens.</p>
{% endmacro %}

{% macro samples(cards) %}
{% if cards | map(attribute=2) | sum(start=[]) | map(attribute=2) | select | list %}
<p class="notes">Text after the first line break is set in italics: the first-line score ignores it.</p>
{% endif %}
{% for source, reference, hypotheses in cards %}
<article>
<p class="source" dir="auto">{{ source }}</p>
<dl>
<div><dt>reference</dt><dd dir="auto">{{ reference }}</dd></div>
{% for name, first, rest in hypotheses %}
<div><dt>{{ name }}</dt><dd dir="auto">
{%- if first or rest %}{{ first }}{% else %}<span class="rest">(empty)</span>{% endif %}
{% if rest %}<span class="rest">{{ "\n" + rest }}</span>{% endif %}</dd></div>
{% endfor %}
</dl>
</article>
{% endfor %}
{% endmacro %}

{% macro recipe(yaml) %}
<p class="notes">Complete and resolved; saved as recipe.yaml it repeats this run.</p>
<div class="scroll tall" tabindex="0" role="region" aria-label="Recipe"><pre>{{ yaml }}</pre></div>
{% endmacro %}
"""
