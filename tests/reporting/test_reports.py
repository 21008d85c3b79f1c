"""Reports: one file each, saying what the record says, readable by people, browsers and CI services."""

import json
import re
import shutil
import subprocess
import xml.etree.ElementTree as ET
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from networks import Anisotropic, LiveInstance, plain_unet
from torch import nn

import normfix
from normfix.errors import NormfixError
from normfix.reporting.endings import ENDINGS, require_ending
from normfix.reporting.report import text_of
from normfix.reporting.schema import SCHEMAS, schema_of, shipped

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def found():
    """A diagnosis with a live norm, a short halo, labels and findings."""
    torch.manual_seed(0)
    net = nn.Sequential(plain_unet(), LiveInstance(), nn.Sigmoid()).eval()
    image = torch.rand(1, 1, 100, 128) * torch.linspace(0, 3, 128)
    return normfix.diagnose(net, image, 32, halo=8, labels=image[0, 0] > 1, per_site=True, halo_curve=True)


@pytest.fixture(scope="module")
def page(found):
    return text_of(".html", found.record, found.maps)


@pytest.fixture(scope="module")
def verdict():
    return normfix.check(LiveInstance(), torch.rand(1, 1, 96, 96), 32)


class Reader(HTMLParser):
    """Collects what a page holds."""

    def __init__(self, text):
        super().__init__()
        self.images, self.links, self.ids, self.headers, self.order, self.words = [], [], set(), 0, [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.order.append(tag)
        if tag == "img":
            self.images.append(found)
        self.headers += tag == "th" and "scope" in found
        self.ids |= {found["id"]} if "id" in found else set()
        self.links += [v for k, v in found.items() if k in ("src", "href", "srcset")]

    def handle_data(self, data):
        self.words.append(data)


def test_the_verdict_comes_first(found, page):
    """The first heading is the verdict with its number and its causes."""
    heading = re.search(r"<h1>(.*?)</h1>", page, re.DOTALL)[1]
    assert f"{found.tile_mismatch.whole.mean_sd:.2g} sd" in heading
    assert "InstanceNorm and too small a halo" in heading
    assert {c.cause for c in found.culprits} == {"instance", "halo"}


def test_the_page_is_self_contained_and_small(page):
    """It fetches nothing, links only within itself, runs nothing, and is under 2 MB."""
    reader = Reader(page)
    assert len(page.encode()) < 2_000_000
    assert "script" not in reader.order
    inside = {link for link in reader.links if link.startswith("#")}
    assert {link[1:] for link in inside} <= reader.ids
    assert all(link.startswith("data:image/png;base64,") for link in set(reader.links) - inside)


@pytest.mark.slow
def test_the_page_can_be_heard_and_tabbed(page):
    """A language, one h1, a way past the navigation, texts for pictures, scopes for headers, scrolling by key."""
    reader = Reader(page)
    assert '<html lang="en">' in page
    assert reader.order.count("h1") == 1
    assert page.index('class="skip"') < page.index("<nav")
    assert len(reader.images) > 10
    assert all(len(image["alt"]) > 15 for image in reader.images)
    assert reader.headers == reader.order.count("th")
    assert page.count('class="scroll" tabindex="0" role="region" aria-label=') == page.count('class="scroll"')


def test_the_page_has_every_part(found, page):
    """Sites with moments, causes, accuracy, receptive field, settings."""
    words = " ".join(Reader(page).words)
    parts = (
        "Causes",
        "Indicators",
        "Distance from the cut",
        "Error against halo",
        "Accuracy",
        "Receptive field",
    )
    for part in (*parts, "Settings"):
        assert part in words
    assert all(site.site in words for site in found.record.sites)
    assert all(row.prediction in words for row in found.record.accuracy)
    assert torch.__version__.split("+")[0] in words


@pytest.mark.slow
def test_light_and_dark(page):
    """Both colour schemes are declared, and every colour of one has its counterpart in the other."""
    light, dark = re.findall(r":root \{(.*?)\}", page)
    assert "prefers-color-scheme: dark" in page
    assert set(re.findall(r"--\w+", light)) == set(re.findall(r"--\w+", dark))


@pytest.mark.slow
def test_names_are_escaped(found):
    """A site or model named like markup stays text, in a page and in Markdown."""
    from dataclasses import replace

    nasty = replace(found.record, model='<script>alert("1")</script>|x')
    assert "<script>" not in text_of(".html", nasty, found.maps)
    finding = replace(found.record.findings[0], where="a|b<i>")
    assert "a\\|b\\<i\\>" in text_of(".md", replace(nasty, findings=(finding,)))


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here to open the page with")
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_reads_it(page, found, tmp_path, scheme):
    """Headless Chromium lays the page out in both schemes: verdict, tables, and pictures with pixels."""
    probe = (
        "<script>addEventListener('load',()=>{const s=getComputedStyle(document.body);"
        "document.title=JSON.stringify({h1:document.querySelector('h1').innerText,"
        "images:[...document.images].map(i=>i.naturalWidth),ground:s.backgroundColor,ink:s.color,"
        "wide:document.documentElement.scrollWidth-innerWidth,"
        "rows:document.querySelectorAll('#causes article').length,"
        "chart:document.querySelector('picture img').currentSrc.length})})</script>"
    )
    (tmp_path / "page.html").write_text(page.replace("</body>", probe + "</body>"), encoding="utf-8")
    flags = ["--blink-settings=preferredColorScheme=" + {"light": "1", "dark": "0"}[scheme]]
    done = subprocess.run(
        [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1100,900", *flags,
         f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=4000", "--dump-dom",
         (tmp_path / "page.html").as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    import html

    seen = json.loads(html.unescape(re.search(r"<title>(.*?)</title>", done.stdout)[1]))
    assert seen["h1"].startswith("Tiles disagree with the whole image by")
    assert len(seen["images"]) > 10
    assert min(seen["images"]) > 200
    sources = re.search(r'srcset="(.*?)".*?src="(.*?)"', page, re.DOTALL).groups()
    assert seen["chart"] == len(sources[scheme == "light"])
    assert len(sources[0]) != len(sources[1])
    assert seen["rows"] == len(found.culprits) == 2
    assert seen["wide"] <= 0
    ground, ink = (sum(map(int, re.findall(r"\d+", seen[k])[:3])) for k in ("ground", "ink"))
    assert (ground > 600 > ink) if scheme == "light" else (ground < 200 < ink)


@pytest.mark.parametrize("name", SCHEMAS)
def test_shipped_schemas_are_current(name):
    """The schema files are what the records say, to the byte."""
    assert shipped(name) == json.dumps(schema_of(name), indent=2) + "\n"


def valid(data, schema, root):
    """Check JSON against the subset of JSON Schema that the files use."""
    if "$ref" in schema:
        return valid(data, root["$defs"][schema["$ref"].rpartition("/")[2]], root)
    if "anyOf" in schema:
        return any(valid(data, option, root) for option in schema["anyOf"])
    if "enum" in schema:
        return data in schema["enum"]
    kinds = {
        "null": type(None), "string": str, "integer": int, "number": (int, float), "boolean": bool,
        "array": list, "object": dict,
    }  # fmt: skip
    if not isinstance(data, kinds[schema["type"]]) or (
        schema["type"] != "boolean" and isinstance(data, bool)
    ):
        return False
    if schema["type"] == "object":
        return set(data) == set(schema["required"]) == set(schema["properties"]) and all(
            valid(value, schema["properties"][key], root) for key, value in data.items()
        )
    if schema["type"] == "array":
        if "prefixItems" in schema:
            return len(data) == len(schema["prefixItems"]) and all(
                valid(d, s, root) for d, s in zip(data, schema["prefixItems"], strict=True)
            )
        return all(valid(item, schema["items"], root) for item in data)
    return True


def test_reports_follow_their_schema(found, verdict):
    """JSON of a diagnosis and of a verdict validate, and one with a field missing or wrong does not."""
    for name, record in (("diagnosis", found.record), ("verdict", verdict)):
        schema, data = json.loads(shipped(name)), json.loads(text_of(".json", record))
        assert valid(data, schema, schema)
        assert not valid({**data, "status": "fine"}, schema, schema)
        data.pop("noise")
        assert not valid(data, schema, schema)


def test_junit_counts(found, verdict):
    """The verdict and every cause are cases; failures are counted."""
    suite = ET.fromstring(text_of(".xml", found.record)).find("testsuite")
    names = [case.get("name") for case in suite.iter("testcase")]
    what = "[1x1x100x128, tile 32x32]"
    assert names == [
        f"{name}{what}" for name in ("tile-invariant", "cause: InstanceNorm", "cause: too small a halo")
    ]
    assert suite.get("failures") == suite.get("tests") == "3"
    assert ET.fromstring(text_of(".xml", verdict)).find(".//failure") is not None


@pytest.mark.slow
def test_junit_of_what_passed_and_of_what_is_open():
    """A pass has no child; inconclusive is an error, never a success."""
    passed = normfix.check(plain_unet(), torch.rand(1, 1, 96, 96), 32)
    opened = normfix.check(plain_unet(), torch.rand(1, 1, 48, 48), 64)
    cases = [ET.fromstring(text_of(".xml", v)).find(".//testcase") for v in (passed, opened)]
    assert len(cases[0]) == 0
    assert cases[1][0].tag == "error"


@pytest.mark.slow
def test_junit_tells_two_checks_apart():
    """By network, image and tile: a CI service shows one test per name."""
    image = torch.rand(1, 1, 96, 96)
    verdicts = [normfix.check(plain_unet(), image, 32), normfix.check(plain_unet(), image, 16)]
    cases = [ET.fromstring(text_of(".xml", verdict)).find(".//testcase") for verdict in verdicts]
    assert [case.get("name") for case in cases] == [
        f"tile-invariant[1x1x96x96, tile {n}x{n}]" for n in (32, 16)
    ]
    assert cases[0].get("classname") == f"normfix.{type(plain_unet()).__name__}"


@pytest.mark.slow
def test_an_assertion_on_a_result_means_that_it_passed(found, verdict):
    """`assert normfix.check(...)` is what people write first; inconclusive is no pass either."""
    opened = normfix.check(plain_unet(), torch.rand(1, 1, 48, 48), 64)
    assert normfix.check(plain_unet(), torch.rand(1, 1, 96, 96), 32)
    for failing in (verdict, opened, found):
        assert not failing


def test_an_assertion_on_a_proof_means_that_it_passed():
    """A proof in which one step failed or none passed is false."""
    proof = normfix.convert(LiveInstance(), torch.rand(1, 1, 96, 96)).proof
    assert proof
    steps = (replace(proof.steps[0], status="failed"), *proof.steps[1:])
    assert not replace(proof, steps=steps)
    assert not replace(proof, steps=())


@pytest.mark.slow
def test_markdown_has_the_verdict_and_tables(found):
    """The step summary starts with the status and holds a row per cause; every row has its table's width."""
    lines = text_of(".md", found.record).splitlines()
    assert lines[0] == "## normfix: failed"
    rows = [line for line in lines if line.startswith("|")]
    assert [r.split("|")[1].strip() for r in rows[2:4]] == ["InstanceNorm", "too small a halo"]
    blocks = "\n".join(lines).split("\n\n")
    for block in (b for b in blocks if b.startswith("|")):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1


def test_a_verdict_has_a_page(verdict):
    """check's own page states the rule and the numbers."""
    words = " ".join(Reader(text_of(".html", verdict)).words)
    assert "4 n, at most 1e-3" in words
    assert f"{verdict.max_sd:.2g}" in words


def test_a_pipeline_has_all_four():
    """What was seen of a pipeline is in every kind of report."""
    net = nn.Conv2d(1, 1, 3, padding=1)

    def halves(x, network):
        return torch.cat([network(half) for half in x.chunk(2, 3)], 3)

    with torch.no_grad():
        record = normfix.diagnose(halves, torch.rand(1, 1, 96, 192), 96, network=net).record
    schema, data = json.loads(shipped("pipeline")), json.loads(text_of(".json", record))
    assert valid(data, schema, schema)
    assert all("halo" in text_of(ending, record) for ending in ENDINGS)


@pytest.mark.slow
def test_a_volume_can_be_drawn():
    """A 3D diagnosis has its pictures too."""
    found = normfix.diagnose(Anisotropic().eval(), torch.randn(1, 1, 8, 48, 48), (8, 16, 16))
    page = text_of(".html", found.record, found.maps)
    assert "plane YX at Z = " in page
    assert len(Reader(page).images) > 10


@pytest.mark.slow
def test_noise_stays_small():
    """The worst pictures, noise in every pixel, still fit: a page stays under 2 MB."""
    import numpy as np

    from normfix.reporting.maps import Maps
    from normfix.reporting.scenes import scenes

    noise = np.random.default_rng(0).random((3, 900, 1200)).astype("float32")
    shown = scenes(Maps(noise, noise, noise, noise, noise, None, ((100,), (300,)), "scores"))
    assert sum(len(d.png) for scene in shown for row in scene.rows for d in row) < 1_200_000


def test_a_notebook_shows_the_same_pieces(found):
    """The repr holds the verdict and pictures of the report."""
    shown = found._repr_html_()
    assert "Tiles disagree" in shown
    assert len(Reader(shown).images) == 5


def test_other_endings_are_refused():
    """A report of an unknown kind is NF610, before anything runs."""
    with pytest.raises(NormfixError, match="NF610"):
        require_ending(Path("report.pdf"))
