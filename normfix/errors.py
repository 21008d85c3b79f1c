"""Errors a user can act on: a stable code, what happened, where, and what to do next.

Every code has one entry in CODES, which `normfix explain NF203` prints; an error whose code is not there
cannot be constructed, so the explanations cannot lag behind the code.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["CODES", "PACKAGE", "NormfixError", "printable", "reason_of", "shown"]

PACKAGE = Path(__file__).parent
"""Where this package lies: a frame below it is ours, any other the user's or a library's."""

CODES: dict[str, str] = {
    # 1xx: what was given
    "NF101": "A model or image file is missing, truncated, or not of a kind normfix reads. Models: pickled "
    "modules and state dicts (.pt, .pth), .safetensors, folders normfix saved, timm:NAME, "
    "pkg.module:factory. Images: TIFF, PNG, JPEG, npy, NIfTI, Zarr. Nothing was changed; give another path or "
    "fetch the file again.",
    "NF102": "A pickle is a program: loading it runs whatever it says. normfix first reads files in a mode "
    "that runs nothing; this one needs classes, which the message lists. If you trust its origin, "
    "repeat the command with --trust-pickle, or allow its classes one by one with --allow-class. Safer: save "
    "model.state_dict() and name the network with --arch.",
    "NF103": "Images are read several times (to measure, to re-measure, to prove), so a generator, which can "
    "be read once, is refused, and so is an empty collection. Give a list or an object with "
    "__iter__.",
    "NF104": "One NaN or infinite value spreads through every statistic of the network; also one that is so only "
    "once it is scaled or in the network's dtype. Replace such pixels (a mask does not help), or choose another "
    "--scale or dtype.",
    "NF105": "The names or shapes of the stored weights are not those of the network that was built. Usually "
    "--arch or --arch-args (number of channels, classes, levels) differ from what the weights were "
    "trained with.",
    "NF106": "The image's axes do not fit what the network takes: channels, number of spatial axes, or dtype. "
    "Name the axes with --axes, one letter each: C for channels; Z, Y, X for space.",
    "NF107": "Scaling is part of the statistic, so it must be stated and fit the image: --scale none, unit "
    "(integers to 0..1), zscore, percentile:LOW,HIGH, MEAN,STD, or --preprocess pkg.mod:function. It "
    "runs over the whole image.",
    "NF108": "A JSON file of normfix is malformed, was edited into something invalid, or was written by a "
    "newer version.",
    "NF109": "The network failed on the input normfix tried, so nothing can be said about it. Give an input "
    "it accepts: --input 1x3x512x512 (channels and sizes as it was trained), or forward_fn in "
    "Python.",
    "NF110": "The network returns several things; --output KEY (a mapping) or --output INDEX (a sequence) "
    "says which counts. Complex outputs are given as real channels, by forward_fn in Python.",
    "NF111": "The factory that should build the network could not be imported or failed. Check the name, "
    "--arch-args, and that its package is installed here.",
    "NF112": "A state dict holds tensors, not the network. Name the network: --arch pkg.module:factory or "
    "--arch timm:NAME, with --arch-args '{\"in_channels\": 1}' for its arguments.",
    "NF113": "A saved folder may name what builds its network, but a file does not decide what runs here: "
    "only network classes that a fixed list of packages define, and builders they list, are called unasked, only with "
    "arguments that name no file or address, and while they are built nothing is opened or fetched. Anything else the "
    "caller repeats: --arch, --preprocess.",
    "NF114": "Output appears whole or not at all, and never over something that exists, also where that appeared while "
    "it was computed: the message says then under which name the result lies. Name a new output, in a folder that can "
    "be written and has room. A command that was done before finds its own output and exits 0.",
    "NF115": "Weights, plan and probe of a saved folder belong together; here they do not: the file was "
    "changed, or the network code of the source package differs from the version it was converted "
    "with.",
    "NF116": "The device does not exist here, or the network cannot be moved to it or to this dtype.",
    "NF117": 'The demo image comes in the package mahotas: pip install "normfix[demo]".',
    "NF118": "normfix takes an nn.Module with data, as it is before torch.compile, whose methods beside forward "
    "(train, state_dict, __repr__, ...) do what those of nn.Module do.",
    "NF119": "Something that must be one is several: a file with two sets of weights that both fit (trained and "
    "averaged), a network inside several prefixes, a folder with several checkpoints. The message names them; "
    "say which with --weights NAME, or give one of the files. Where there are no sets of weights to choose among, the "
    "choice is left out.",
    "NF120": "The configuration beside the weights does not say in plain values how the network is built: it is "
    "missing, of an older kind, or computes it with an expression, which would run code. Name the network: "
    "--arch pkg.module:factory --arch-args JSON.",
    "NF121": "The file is built to harm or badly damaged: it unpacks to far more than it is, leads outside of "
    "itself, grows without end, or would run something on opening. It was not opened.",
    "NF122": "--allow-class allows classes, which torch's safe mode builds without running their code's "
    "constructors at will; a function could do anything. Trust the whole file with --trust-pickle, or save the "
    "state_dict.",
    "NF123": "TorchScript is opened as the program that torch makes of it, which ends at control flow that depends on "
    "values, at hooks, at objects of other code, and at networks that do not begin with a convolution. Trace the "
    "network, export it (.pt2), or save its state_dict and name the network with --arch.",
    "NF124": "A program of torch.export holds a graph of operations, not modules, so norms cannot be swapped in "
    "it as in a network. Give the network it was exported from.",
    "NF125": "hf-hub:ORG/NAME@REVISION is fetched through huggingface_hub; the repository or revision does not "
    "exist, is private, or the hub cannot be reached. HF_TOKEN and HF_ENDPOINT are respected.",
    "NF130": "pyproject.toml is read for the table [tool.normfix]; this one is no TOML.",
    "NF131": "The table [tool.normfix] of pyproject.toml sets defaults of the commands' options, by their names, for "
    "all commands or in [tool.normfix.COMMAND] for one. Options that run code or say where output goes cannot be "
    "set there. normfix --show-settings prints what counts.",
    "NF137": "A mask says for each pixel of its image whether to ignore it (nonzero: ignored). There is one mask per "
    "image, in their order, of the image's extents without channels.",
    "NF138": "Statistics need values: a mask ignored every pixel of its image, or a pixel in every cell that a coarse "
    "map's positions stand for. A position counts where none of its pixels is ignored. Nonzero means ignored; an "
    "inverted mask is the usual cause.",
    "NF139": "Some statistics mean nothing for a part of the image: sums and norms over space grow with the number of "
    "pixels, a median or a matrix product has no law, and rows are no map. With a mask or a sample they are refused, "
    "and so are networks that cannot run in stages, for only there pixels are ignored.",
    "NF140": "A sample is drawn from the blocks of a converted network's images, until the standard errors of all "
    "statistics are at most --sample sd. Statistics of a sample are estimates: the record says so.",
    "NF141": "A file may hold several images (series of a TIFF, images of an OME-Zarr). Which is meant is not guessed: "
    "--series NAME or NUMBER.",
    "NF142": "The format of the output has no place for this array. Give another ending.",
    "NF143": "The library that reads and writes this format is an extra, which the message names.",
    "NF144": "Opening a program (.pt2) runs it once on a small image, and what it would take for that is foreseen "
    "operation by operation. This one would take more memory or time than a file of its size may or, where its "
    "sizes are fixed to a large image, than such an image may or this machine has: export it with free sizes.",
    "NF148": "A statistic is NaN or infinite on the given images, or does not fit the dtype it is kept in: the "
    "network overflows there, or its variance does, by images in another scale or in half precision. "
    "Nothing was changed.",
    "NF149": "The prediction of a finite image has NaN or infinite values: the network overflows on it (another scale "
    "than it was trained with, half precision), or gives such values by design, as the logarithm of 0 or masked "
    "logits do. For those, --allow-nonfinite (allow_nonfinite=True in Python) writes them as they are.",
    "NF150": "A Zarr image names the codecs that it is read by. Only a list of them is run, each with a bound on what "
    "it unpacks to, since others run what they read (pickle) or grow without end. Write the image again with zstd, "
    "blosc or gzip.",
    # 2xx: finding and planning
    "NF201": "The network ran at one size only, or makes other calls at others, so space could not be told from "
    "channels by varying it; dimensions from the third on were taken as space.",
    "NF202": "A norm that the network owns did not run on the example, so nothing can be measured for it. It "
    "is left as it is.",
    "NF203": "The statistic is live and has no stored value, so freezing it needs at least one image to "
    "measure it on.",
    "NF204": "A --keep pattern matches no owner of a site; the message lists the owners.",
    "NF205": "The plan is not of this network: sites, layers or kind of conversion differ, or it says two things of "
    "one site. Make it anew with normfix plan. A module and the program (.pt2) exported from it have plans of their "
    "own.",
    "NF206": "The call cannot be intercepted without leaving it live unnoticed, or its statistics cannot be "
    "carried over.",
    "NF207": "At run time an intercepted module made other calls than when it was planned. Rather than leave "
    "a statistic live unnoticed, the converted network stops.",
    "NF208": "normfix works on a deep copy, and this network cannot be copied.",
    "NF209": "Normalisation over 1, 2 or 3 spatial axes can be converted; this one has another number.",
    "NF210": "The network runs on no strip (long on one axis, thin on the others), so it cannot be tiled or "
    "proved.",
    "NF211": "The output does not grow with the input along an axis, so there is nothing to stitch along it.",
    "NF212": "Some operation spreads over the whole extent although every known statistic was frozen, for "
    "example a softmax over space, a Fourier transform or a sort. No halo is enough.",
    "NF213": "The output does not move with the input, or is another in a window than in the whole image, though no "
    "statistic is live: something knows the place of a pixel or the size. Typical: align_corners=True, position "
    "embeddings, resizing to a fixed size, a division by H*W, a branch on the size, a cyclic shift. Tiles cannot equal "
    "the whole until it is taken out; NF244 names the calls that are known. Else keep to one tile size, or "
    "predict whole images.",
    "NF214": "The output is not a map (N, C, *space) of the input's extent, so there is nothing to stitch: a "
    "classifier, tokens, or a map with channels last. Choose another output with --output, features_only for timm "
    "networks, or bring it to that layout with forward_fn in Python or a module around the network.",
    "NF215": "A live statistic remains that normfix has no rule for, or that no constant can replace "
    "(attention over all tokens). Geometry and tile exactness cannot be claimed while it is live.",
    "NF216": "The halo is read from where NaN spreads to, and a comparison, argmax or cast turns NaN into an "
    "ordinary number. Choose the output before that step (probabilities instead of labels) with --output or "
    "forward_fn.",
    "NF220": "An exported program keeps the sizes it was exported with unless they were left free. One with "
    "fixed sizes runs on no other image and on no tile, so it cannot be measured, tiled or proved. "
    "Export the network again with the line in the message: a batch of 2 and Dim.AUTO.",
    "NF221": "torch.export could not capture the network, or what it captured differs from it, so the graph "
    "says nothing. Scanning and converting go on with the other looks.",
    "NF222": "The looks at a network disagree: one saw a statistic that another did not. Nothing is resolved "
    "silently; the proof of a conversion decides.",
    "NF223": "The exported graph has an operator that normfix knows nothing of, a custom one for instance. It "
    "may look at the whole extent; only the proof on tiles tells.",
    "NF230": "Some statistics have no population law: a median, a matrix product over space, a pool of a pool. The "
    "value of one image can be frozen, the values of several cannot become one. Give one image, or keep the "
    "module that computes it.",
    "NF231": "A statistic that the network divides by (a variance, a range, a norm) is at or below its eps on every "
    "calibration image: a channel that nothing in them reaches, an empty field, blank padding. Frozen, it would be a "
    "constant of next to nothing, and the first image with structure there is multiplied by up to 1/sqrt(eps). "
    "Calibrate on images that have such structure. If the channel is dead for good, or such images are all there "
    "will be, --allow-flat (allow_flat=True) keeps it, and record, report and model card name it.",
    "NF240": "The dye (one NaN pixel followed through a real forward pass) shows that the result of this operation "
    "depends on the whole extent, and the list of calls has no rule for it. It counts as a live site and is refused. "
    "A statistic that is written with known functions of torch (mean, var, amax, norm) is converted; attention and "
    "the like are not. Until then keep the tile size fixed.",
    "NF241": "Two looks at the network disagree about this site. Nothing is assumed in favour of either: what one of "
    "them holds for live counts as live. If the network takes another path at another size, scan it with an input "
    "of the size it is used at (--input).",
    "NF242": "normfix does not know this operation and could not watch it on dyed input, so it is not taken for local. "
    "Check what it reads: an operation that looks at the whole image, or as far as the data tells it to, makes "
    "tiles differ.",
    "NF243": "A comparison, a selection or a cast to integers outside the known pointwise ones took the dye out, so "
    "what depends on its result is not seen. An argmax over space, for instance, depends on the whole image.",
    "NF244": "The call depends on absolute size or position, which a tile does not share with the whole image. Neither "
    "a frozen statistic nor a halo repairs that. Where the message says that sizes are built in, the network "
    "runs on one size only.",
    "NF245": "A halo is read from where NaN spreads to, and some operations would take NaN for an address in memory "
    "(deformable convolutions, sampling at computed coordinates, operations from outside torch). They are not run "
    "on it; how far they read depends on the data.",
    "NF246": "What the network gives for an input depends on what it ran on before: a value kept on self, a running "
    "average that is updated in eval mode, random numbers from a generator of its own. No tiling of it is defined.",
    "NF247": "A pattern of parameters to train matches none, so nothing would train that it names.",
    "NF248": "normfix prove shows what holds of a network that normfix converted and that was trained or calibrated "
    "since. This one carries no plan, or one that converted nothing. Convert it first; normfix check compares "
    "tiles of any network.",
    "NF249": "Statistics measured anew on the given images differ from the stored ones. After fine-tuning the "
    "weights are others, and running statistics of training are averages over batches: measure them on whole images "
    "with normfix calibrate MODEL IMAGES -o OUT (run.recalibrate(images) in Python), then prove OUT on the same "
    "images. If nothing was trained, it was calibrated on other images, or its original's running statistics "
    "were carried over, which are those of its training data.",
    "NF250": "Memory ran out, mostly while the network was run. That says nothing about which inputs it takes, so "
    "nothing was concluded from it, and no output is half written. Give a smaller --input or image, smaller tiles, "
    "read images by window (--engine stages with --budget), or compute on another device.",
    "NF251": "The graph bounds how far an output depends on its input, and the dye shows that it depends on more. The "
    "dye runs the network itself, so a rule by which normfix derives the bound is wrong. Nothing that follows from the "
    "bound can be relied on. --halo measured takes what the dye shows; please report it.",
    "NF253": "The graph allows the output to depend on pixels much further away than the dye shows on any strip that "
    "was run. Values decide which is the case, and other images or weights have other values, so tiles read as far as "
    "the graph allows. --halo measured takes what the dye shows instead, and says so.",
    "NF252": "A flip, a roll, attention over blocks, a call that takes the size or a place into account, or an "
    "operation normfix does not know: each may depend on the whole image, and was measured not to. The dye, followed "
    "through everything that swallows it, stays within the halo; tiles keep their values whatever is beyond it, on "
    "images of several magnitudes; windows far along a strip equal the strip. It is left as it is.",
    "NF254": "Tiles are put together where a place in the image has a place in the output, so the output must have a "
    "fixed number of pixels per pixel of the input, such as 2, 1, 3/2 or 1/8. Resize by such a factor, or choose the "
    "output before the resize.",
    "NF260": "The network asks for the size of its input and goes another way at some sizes, so that what was scanned "
    "and proved is another network than what runs on this image, or on a window of its tiles. The condition is in the "
    "message, in pixels: H, W (D, H, W; L) are extents, N is the number of images. Conditions that only repeat with "
    "the size (padding to multiples) are none of these. Take the branch out, or scan and convert with an image, and "
    "use a tile, for which the condition is the same.",
    "NF261": "The image is of a size that was not proved: no captured graph tells how the network treats sizes, and "
    "it is larger than what was compared, or too large to be compared whole; or it lies beyond a branch on the size, "
    "on both sides of which tiles equalled the whole where they were tried. normfix check compares tiles with the "
    "whole at this very size.",
    "NF262": "What the network does is switched by a statistic or a weight: a branch that was shut when it was "
    "converted is open under those of now, or the other way round. Its stride, halo and sizes were measured anew; "
    "where none hold, tiles do not equal the whole image any more and it is not predicted in tiles. normfix calibrate, "
    "--statistics per-image and training do this.",
    "NF263": "At sizes that the network's stride does not divide it may compute what no tiles give, such as a skip "
    "connection that is resized. There an image is extended at its end by its edge pixels to the next size that is "
    "exact, measured and predicted so, and the result cut back. Crop or extend images yourself to multiples of the "
    "stride to decide what is at the border.",
    "NF264": "No captured graph tells how the network treats sizes, and at the image's size, on a strip as long, or in "
    "a window of its tiles, it gives tiles another value than the whole, though they equalled it on what was compared "
    "before: something in it goes by the place of a pixel in the whole image, such as a mask from a row on, or by the "
    "size, such as a table by width. Take that out, or predict the image whole.",
    "NF224": "A program (.pt2) could not be read, or is not what torch.export.save writes for one image and "
    "the tensors it holds.",
    "NF225": "The network cannot be written as an exported program: torch.export failed, or something in it "
    "needs code that does not travel with the file.",
    "NF226": "The written program does not give the converted network's output to the bit, so it was removed.",
    "NF227": "A program is written to one file whose name ends in .pt2.",
    "NF228": "In a converted program a frozen norm still normalises, so it can be measured anew on other images. A "
    "frozen mean, pool or functional norm is a constant there and nothing else. Calibrate what the program was "
    "written from, and write it again.",
    "NF229": "The captured graph could not be read, by a fault of normfix. It says nothing then; scanning and "
    "converting go on with the other looks. Please report it with the network.",
    # 3xx: calibrating
    "NF301": "A site ran more or less often than once per image, so its statistic is not defined. The network "
    "takes another path on these images than on the example it was scanned with.",
    "NF302": "The network has live statistics, or none to calibrate. Convert it first.",
    "NF320": "The network could not be captured as a graph, or its graph holds for one image size only, so it cannot "
    "run in stages over blocks. Nothing is lost but speed and memory: it runs as a whole, one pass per "
    "statistic.",
    "NF321": "The captured graph does not take an image of this size. Sizes are often multiples of the network's "
    "stride; images are extended to one that is exact. Where padding to windows makes sizes too intricate for a graph "
    "of all, there may be one of multiples: crop or extend the image to those, or predict it whole.",
    "NF322": "An operation of the captured graph writes into its operand, which may be kept for later stages.",
    "NF323": "A later stage needs a value that is not laid out over the image, or depends on all of it, so it cannot "
    "be kept in blocks. The network runs as a whole instead.",
    "NF324": "A stage's blocks would differ from the whole whatever their halo: it looks at the whole extent, or "
    "depends on size or position. The network runs as a whole instead.",
    "NF325": "Blocks were compared with the whole, or came out with another extent than the whole has there, and "
    "differ. The network runs as a whole instead.",
    "NF326": "Values between stages do not fit the memory budget. Raise it, or name a folder with room (and install "
    "normfix[stream] for zarr).",
    "NF327": "Reading or writing the values kept on disk failed: the disk is full, the folder is gone or may not be "
    "written, or its normfix-run holds what normfix did not put there. "
    "Nothing half written is used; make room or name another folder with --store, and give the same command "
    "again, which goes on where it stopped.",
    "NF328": "The store holds an unfinished run of something else: another network, other weights, images, blocks, "
    "threads or versions, which the message names. Nothing is mixed. Repeat the command that began it, name another "
    "folder, or delete the folder normfix-run in it.",
    "NF329": "The manifest or the journal of an unfinished run is not what was written, so nothing in it can be relied "
    "on. Delete the folder normfix-run in the store and start anew.",
    "NF330": "A value that was kept on disk is gone, cut short, fails its checksum, or is whole but not the one that "
    "this run wrote at this place. Check the disk, delete the "
    "folder normfix-run in the store and start anew.",
    "NF331": "An image file changed or vanished while it was read, or images are drawn anew each time they are read, "
    "so what was computed would be of two images. Nothing has the result's name. Put the file back as it was and give "
    "the same command again, or start anew; draw random images once, as a list.",
    "NF332": "Two processes cannot keep their values in one store: one of them would take the other's for its own. "
    "Name another folder with --store.",
    "NF333": 'A cluster is reached through dask.distributed: pip install "normfix[dask]", here and where its workers '
    "run.",
    "NF334": "A dask cluster needs the address of its scheduler (--scheduler tcp://HOST:8786), a scheduler and workers "
    "that answer there, and a store that all of them see (--store).",
    "NF335": "A worker of the cluster could not take the work: normfix is not installed there or is of another "
    "version, the store or the image is not on storage that it sees, or the image is an object that cannot be sent "
    "(give a path).",
    "NF336": "The same block ended several workers one after another, mostly for want of memory. Give smaller blocks "
    "(--tile), or workers more memory. What is whole is kept; the same command goes on from there.",
    "NF337": "The system refused to read or write something that is needed on the way, such as the folder for "
    "temporary files (TMPDIR): no room, no permission, a read-only disk, too many open files. No output is half "
    "written; put that right and give the same command again.",
    "NF338": "Stage by stage, what each block measured is held until its stage ends, so an image may have up to a "
    "million blocks. Give larger blocks (--tile): 1024 pixels in place of 512 are a fourth of them.",
    "NF340": "What reads a site's statistic was not found in the captured graph, so stages after it would be measured "
    "under the statistic it had before. Nothing is measured then. Passes over whole images do not use the graph: "
    "calibrate without tile, store or budget.",
    # 4xx: checking and predicting
    "NF401": "This site computes its statistic from the tile, so tiles disagree whatever the halo.",
    "NF402": "Tiles must start in phase: a tile size is a positive multiple of the network's total stride on "
    "each axis.",
    "NF403": "A tile's output depends on pixels beyond its halo. Measured by amplifying everything outside "
    "the window by 1e12 in float64, because one missing stride is invisible on ordinary images.",
    "NF404": "The output does not vary on this image, or is not finite, so agreement proves nothing.",
    "NF405": "The difference disappears in float64: it was rounding.",
    "NF406": "The difference stays in float64: it is structural.",
    "NF407": "Every window covered the whole image, so tile and whole are the same computation and agreement "
    "proves nothing.",
    "NF408": "The difference is larger than four times the measured noise floor but within the threshold.",
    "NF409": "Tiles of this network do not give its prediction of the whole image; convert it first.",
    "NF410": "A halo is 'auto' or a number of pixels; a threshold is a number of standard deviations. Predicting needs "
    "at least the halo that was measured, since with less the result is not the whole image's.",
    "NF411": "A portable result is the original class with new statistics, which is exact only where every "
    "converted site was a BatchNorm with running statistics. Other norms have no place for constants: their class "
    "would load the file and stay live. normfix give-back asks the library for BatchNorms; else save the folder.",
    "NF412": "The original class, filled with the converted network's state, does not give the converted network's "
    "output, so nothing portable was written. Save the normfix folder instead.",
    "NF413": "Pushing goes through huggingface_hub: the folder must be one that normfix saved, its proof must have "
    "passed, no file of it may be a link to one elsewhere, which would be published, and the token (HF_TOKEN, or hf "
    "auth login) must be allowed to write to the repository.",
    "NF414": "Blocks have one size: tile=, or that of normfix.Blocks.",
    "NF420": "Exported programs (.pt2) are written and read from torch 2.8 on: before, their layout held pickles. With "
    "an older torch, and for a file of one, take the network itself or a saved folder, which need no newer torch. What "
    "needs which release: docs/installing.md.",
    # 5xx: saving
    "NF501": "Nothing is written that was not proved. See which step failed and where; --partial writes it "
    "all the same, with what remains live stated. Sites that were refused, as no constant can replace them, do "
    "not hinder: the rest is converted, proved and written, and they are named.",
    "NF502": "Only a network that normfix converted carries the plan a saved folder needs, one plan that starts "
    "at the original network, and only what its state_dict holds as tensors can be written.",
    "NF503": "What was written did not load back as the same network, so it was removed.",
    "NF520": "A file of a saved folder is not the one that was saved: a checksum in normfix.json differs. Fetch it "
    "again from where it came from, or convert the network again.",
    "NF521": "The certificate names every tensor that the program holds by its SHA-256. One of them has other values "
    "now, so what is said of the network, its statistics above all, is said of another. Fetch or convert it again.",
    "NF522": "The program in a saved folder is not the network whose weights lie beside it: its tensors have other "
    "names, types, shapes or values, or it gives another output for the seeded probe. Fetch or convert it again.",
    "NF523": "Derived again from the program, the reach, lattice, scale, sites or assumptions are others than the "
    "certificate says: certificate, plan or program was changed, or another version of normfix derived it. Convert the "
    "network again.",
    "NF524": "The stride, halo, scale or exact sizes that tiles are cut by do not follow from the program: tiles would "
    "differ from the whole without a sign. Convert the network again.",
    "NF525": "The conditions on the image's size are not those of the program: predict and check would not refuse "
    "images for which the network is another. Convert the network again.",
    "NF526": "Nothing was decided, which is no pass. A folder of a version before certificates, or of a network that "
    "torch.export does not take, holds nothing to derive from; a halo that no graph bounds was measured. `normfix "
    "prove FOLDER IMAGES` measures and compares on images instead.",
    "NF530": "One image is taken at a time here, and a folder, a pattern or a list of several was given. Call it for "
    "each of them; normfix convert, calibrate, predict and check take several on the command line.",
    "NF531": "Predictions of several images go to a folder (-o with a name that has no ending), each named after its "
    "image. Two images of one name would have one prediction, and one in the images' own folder would have the name "
    "of its image: nothing is written over anything.",
    "NF532": "--channels 0,2 takes channels of a file by their numbers from 0, in this order, as the network shall get "
    "them. The axis of channels must be known, from the file or by --axes, and have them.",
    "NF533": "--slices Z or T runs a network of two axes over a stack, each plane by itself (T: also one of three). "
    "The axis must be known, from the file or by --axes, and be none that the network takes.",
    "NF534": "What a prediction is written as: raw (the network's numbers), classes (the number of the largest of "
    "several channels), probabilities, or mask (255 where the probability is above the threshold, 0.5 unless stated). "
    "Some make no sense for what the network gives.",
    "NF535": "Probabilities lie from 0 to 1, and of the logits of an image some do not. What the network gives is what "
    "was not said: a network that ends in a softmax or sigmoid needs --logits none, another one must not have it.",
    "NF550": "Giving back puts constants into BatchNorms of the network's own library. That needs a converted network "
    "without live statistics, none of whose frozen statistics is anything but a norm, and what builds it.",
    "NF551": "The library was asked for the same network with BatchNorms, by its factory's arguments, and builds none "
    "that could hold the constants. Name the argument with --switch NAME=VALUE, or use the folder or a program.",
    "NF552": "The library's network, filled with the constants, is not the converted one: its output or tiles differ. "
    "Nothing was written.",
    "NF553": "The original is not what was converted, is of no format that is given back, or is needed and missing.",
    "NF554": "In a process without normfix, the library did not load what was written, or gave another output, so it "
    "was removed.",
    "NF575": "A network that branches or loops by torch.cond, while_loop, map or scan: torch compiles these whole, so "
    "no statistic in them is seen or converted. Write the branch as torch.where or a plain `if`, the loop as a `for`.",
    "NF590": "ONNX (.onnx) and TorchScript (.ts) are written by torch's own exporters and run once in a fresh process: "
    "for ONNX that needs onnx, onnxscript and onnxruntime (pip install 'normfix[onnx]'), and operators that the "
    "exporter knows. A program (-o FILE.pt2) or a folder holds what they do not.",
    "NF591": "The form that was written, run by its own runtime in a fresh process, does not give the converted "
    "network's output to rounding, or its tiles are not its whole, so it was removed. TorchScript is traced: what a "
    "network computes of its sizes in Python is tied to the size it was traced at; ONNX keeps sizes free.",
    "NF592": "A bioimage.io package (folder, .zip or rdf.yaml, format 0.4 or 0.5) is refused where it is not what its "
    "description says: a file that is missing, lies outside, is only an address, or has another sha256 than stated, a "
    "description of another kind, more than one input. Nothing is fetched, and nothing was built. Fetch it again.",
    "NF593": "A bioimage.io package names the code that builds its network. Networks of torch-em, pytorch-3dunet and "
    "MONAI are built by the installed library; any other file of code runs only if --allow-code names its sha256.",
    "NF594": "A network that was built for a bioimage.io package must give the package's test outputs for its test "
    "inputs, to 1e-3 of the output. It did not, so it is another network, or has other weights, and is not used.",
    "NF595": "The error against the halo is measured between no halo and the exact one, on an image that is larger "
    "than a window. This network has no exact halo (see normfix scan), or every window was the whole image.",
    "NF596": "An ONNX file holds a graph of ONNX operators and no modules of PyTorch to look into and convert. Give "
    "what it was exported from; the fixed network is written as ONNX again (convert -o FIXED.onnx).",
    "NF597": "A bioimage.io package is written back with one output over the same axes of space as its image, and with "
    "a scaling that its description has a step for. Use the folder through normfix.load, or -o FILE.ts, FILE.onnx.",
    "NF598": "Keys and values of attention that are held as constants (--keys) are as large as the images, in memory "
    "and in the file; over 2 GiB it has to be said how many are kept: --keys N. Each image then gives an equal share, "
    "drawn at random, and the report says how far its prediction moved.",
    # 6xx: diagnosing
    "NF571": "Batch statistics of patches as small as the tile do not exist for this network, since a channel has one "
    "value there. So diagnose could not compare train mode with eval mode; larger tiles or batches show it.",
    "NF580": "What an output means is probability, logits, softmax, scores, labels or regression; another word would "
    "be read as numbers, without Dice and without classes.",
    "NF601": "Even with every known global operation held constant, no halo or stride could be measured, so "
    "there is no right tiling to compare with. Diagnose it as a pipeline, by a function predict(image).",
    "NF602": "A tiling says, for each spatial axis, how many pixels a tile has and how many pixels before and after "
    "it are read.",
    "NF603": "The network does not run on this size, so the image was extended by its edge pixels to the next size "
    "it is exact at; that image is the whole.",
    "NF604": "Labels have the spatial shape of the prediction: one channel of class numbers, or a mask per channel. "
    "Both are whole numbers.",
    "NF605": "A pipeline is a function predict(image) that takes an array (C, *space) and returns an array of the "
    "same spatial extents, and gives the same answer each time.",
    "NF606": "The output is constant or not finite, so a difference has no unit and agreement proves nothing.",
    "NF607": "No two windows overlap outside the border of the image, so tiles could not be compared.",
    "NF608": "Cropping the image changes what the pipeline predicts far from the crop's border, so its result "
    "depends on where its tiles fall.",
    "NF609": "The pipeline's own steps were observed by running it with probe networks in place of its network. What "
    "they could not see is named, since a cause there would not be.",
    "NF255": "The network gives an output that is a multiple of its stride, fewer pixels for a window that is not. A "
    "tiling whose windows lie off the stride grid leaves pixels that no window predicts. Tiles and halos that are "
    "multiples of the stride work.",
    "NF610": "A report's ending decides its kind: .html, .json, .md or .xml.",
    "NF585": "An inferer hands the network's other arguments to every tile as they are, so a map of the image among "
    "them would be that of another place. Channels of the image are cut with it.",
    "NF586": "A predictor of nnU-Net's with exact tiles needs networks without live statistics: convert(cases) makes "
    "them, use(networks) takes those that were made before.",
    "NF587": "Constants are statistics of whole images (whole), of windows of the size that the network was trained "
    "on, or of each image (images), pooled by a law: windows:SIZE[:geometric|arithmetic|median|total]; a blend with "
    "stored ones (blend:WEIGHT), of each image when it is predicted (per-image), or fitted (distilled:SIZE). SIZE can "
    "be left out where the network's file states the windows of its training, as nnU-Net's plans do.",
    "NF588": "Windows and images that are pooled by a law have statistics of all of their pixels, without masks and "
    "samples, and their laws are laws of norms that keep their statistic: not of groups re-expressed as BatchRenorm.",
    "NF555": "Constants are chosen for norms that are measured on images. This network has none: its norms use the "
    "statistics that are stored, or it has no norm over space.",
    "NF556": "normfix choose measures constants on some images and judges them on others: by labels, or by "
    "the original's own prediction in windows of its training size (--window). It needs one of the two, an image that "
    "can be halved or several, and a network whose tiles can be exact.",
    "NF557": "Accuracy needs labels for each image, of its extents, and an output that has Dice with them: "
    "probabilities, logits, classes. For any other give a metric, a function of prediction and labels; more is better.",
    "NF558": "Constants are distilled by gradient descent towards the original in windows of its training size, some "
    "of which are held out. That needs two windows or more, an output with a gradient, and a network it passes.",
    "NF559": "A blend takes a share of the statistics that the original has stored, and distilled constants are fitted "
    "to the original. Neither can be measured anew in the converted network alone, nor where nothing is stored.",
    "NF589": "Calibration images are unlike each other, or unlike what the network has stored of its training, by the "
    "median channel of a norm: over 8 times stronger or weaker, or 6 sd off. Mostly one is scaled otherwise. Said, not "
    "refused.",
    "NF570": "The proof of this network's conversion did not pass. Where its tiles differed from its whole, predict "
    "refuses it; where another claim failed, or could not be decided, predict says so.",
    # 9xx: normfix itself
    "NF901": "Something failed inside normfix. Nothing was written. Please report it with the traceback that "
    "--debug prints.",
}
"""What `normfix explain CODE` prints, by code."""


class NormfixError(Exception):
    """Refuse with a code, a place and the next step.

    Args:
        code: a key of CODES, such as "NF203".
        message: what happened and what to do next, in full sentences.
        where: a site path or a file name, put before the message.
    """

    def __init__(self, code: str, message: str, *, where: str = "") -> None:
        if code not in CODES:
            raise KeyError(f"{code} is not in normfix.errors.CODES")
        # names in files may hold terminal sequences, or be of a megabyte
        where, message = printable(where), _shortened(printable(message))
        self.code = code
        self.where = where
        self.message = message
        super().__init__(" ".join(part for part in (code, f"{where}:" if where else "", message) if part))

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.code, self.message, self.where), vars(self)


def reason_of(error: BaseException) -> str:
    """Return what an error of other code is and says, in one line that is not long.

    >>> reason_of(ValueError("no\n  such size"))
    'ValueError: no such size'
    """
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def printable(text: str) -> str:
    r"""Return a text in which what would steer a terminal, lines included, is written as its escape.

    >>> printable("a\x1b[2J b")
    'a\\x1b[2J b'
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def shown(text: str) -> str:
    r"""Return a text of several lines as a terminal may show it: each line printable; see `printable`.

    >>> shown("a\x1b]0;title\x07\n  b")
    'a\\x1b]0;title\\x07\n  b'
    """
    return "\n".join(map(printable, text.split("\n")))


_LONGEST = 20_000
"""Characters of a message; lists of three hundred series or sites take as many."""


def _shortened(text: str) -> str:
    """Return a text, of one that is longer than messages are its beginning and its end, where the next step stands."""
    if len(text) <= _LONGEST:
        return text
    return f"{text[: _LONGEST // 2]} ... {text[-_LONGEST // 2 :]}"


def _rebuild(kind: type[NormfixError], code: str, message: str, where: str) -> NormfixError:
    error = kind.__new__(kind)
    NormfixError.__init__(error, code, message, where=where)  # a subclass may take other arguments
    return error
