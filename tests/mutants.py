"""Breaks named places of the package, one at a time, and shows that the tests notice: `make mutants`.

A mutant is an exact text of one file, what stands in its place, and the tests that have to notice. `src` is copied and
the copy is broken, so the files themselves are never touched. The tests first have to pass on the copy as it is. A
mutant is noticed when a test fails, not when nothing can be imported any more. Words on the command line pick mutants
by their names. Exit status 1: a mutant was not noticed, or could not be tried.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

_CANNOT_RUN = ("ImportError", "ModuleNotFoundError", "NameError", "SyntaxError", "IndentationError")
"""A test that ends with one of these noticed nothing: the mutant cannot run at all."""


@dataclass(frozen=True)
class Mutant:
    """One way to break the package.

    Attributes:
        name: what is broken, in words.
        file: under `src/rankwise`.
        old: text that is there exactly once.
        new: what stands there instead.
        tests: files under `tests`, or single tests in them (`file::name`), one of which has to fail.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    def applied(self, text: str) -> str:
        """The file's text, broken.

        Raises:
            ValueError: when the old text is not there exactly once.
        """
        found = text.count(self.old)
        if found != 1:
            raise ValueError(f"the text to change is {found} times in {self.file}, not once")
        return text.replace(self.old, self.new)


OWN_METRIC = "methods/test_own_metric.py"

MUTANTS = (
    Mutant(
        "a tied head keeps a matrix of its own",
        "layers/coding.py",
        "hold_head(read, None, None, looked_up)",
        "hold_head(read, *eight_bits(read.weight.detach() * 1.5, GROUPS))",
        ("layers/test_vocabulary.py",),
    ),
    Mutant(
        "sizes count embeddings as numbers that are codes",
        "stages/work.py",
        "total += coded[name] + len(name) + _HEADER",
        "total += parameter.numel() * loaded.stored_dtypes[name].itemsize",
        ("layers/test_vocabulary.py",),
    ),
    Mutant(
        "statistics of peers of an expert are not collected",
        "stages/chosen.py",
        "if site.name not in names or site.pool in pools}",
        "if site.name not in names}",
        ("stages/test_chosen.py",),
    ),
    Mutant(
        "channels of a weight that is left out are put in another order",
        "stages/fitting.py",
        "sites = [site for site in work.sites if site.name not in work.left_out]",
        "sites = list(work.sites)",
        ("stages/test_chosen.py",),
    ),
    Mutant(
        "a cut norm divides by the width that is left",
        "layers/narrow.py",
        ".sum(-1, keepdim=True) / self.width",
        ".mean(-1, keepdim=True)",
        ("layers/test_narrow.py", "flows/test_slicing.py"),
    ),
    Mutant(
        "a gain is lost where the stream is turned",
        "layers/narrowing.py",
        "_put(block, path, fold_gain(weight, gain) @ q * scale, bias)",
        "_put(block, path, weight @ q * scale, bias)",
        ("layers/test_narrow.py",),
    ),
    Mutant(
        "the mean is not taken out of a writer",
        "layers/narrowing.py",
        "        weight, bias = without_mean(weight), None if bias is None else without_mean(bias)\n",
        "        pass\n",
        ("layers/test_narrow_families.py::test_a_family_turned_and_not_cut_gives_the_same_logits",),
    ),
    Mutant(
        "a shift is lost where the stream is turned",
        "layers/narrowing.py",
        "old.bias if shift is None else fold_shift(weight, old.bias, shift)",
        "old.bias",
        ("layers/test_narrow_families.py::test_a_family_turned_and_not_cut_gives_the_same_logits",),
    ),
    Mutant(
        "directions that hold least come first",
        "linalg/principal.py",
        ".eigenvectors.flip(-1)",
        ".eigenvectors",
        ("layers/test_narrow.py",),
    ),
    Mutant(
        "adapters are not counted",
        "sizes/stream.py",
        "return cut + self.adapters * kept * kept * self.blocks + (self.width - kept) * (kept + self.last)",
        "return cut",
        ("sizes/test_stream.py",),
    ),
    Mutant(
        "a sliced model's score is taken for that of another size",
        "stages/keys.py",
        '"model": work.smaller or work.fingerprint',
        '"model": work.fingerprint',
        ("flows/test_slicing.py::test_what_was_sliced_is_taken_over_and_another_size_is_not",),
    ),
    Mutant(
        "the share of an error along its own row is not counted",
        "methods/quantize.py",
        " + along**2 * whole",
        "",
        ("methods/test_estimates.py",),
    ),
    Mutant(
        "a plan takes what an earlier run measured before what it estimates itself",
        "stages/outlooks.py",
        "if q_bits in estimated:",
        "if q_bits in estimated and not self.folder.has(outlook_file(site, q_bits)):",
        ("methods/test_caldera.py",),
    ),
    Mutant(
        "feedback makes no target larger than the weight is",
        "quantizers/expected.py",
        "sizes[block + 1 :] += beside[block] * growth[block, block + 1 :]",
        "sizes[block + 1 :] += 0 * growth[block, block + 1 :]",
        ("quantizers/test_expected.py",),
    ),
    Mutant(
        "what stands in for columns that are not there is counted as rounded",
        "quantizers/expected.py",
        "cost[self.columns :] = 0",
        "cost[len(cost) :] = 0",
        ("quantizers/test_expected.py",),
    ),
    Mutant(
        "products of attention are not counted among a model's operations",
        "evaluation/operations.py",
        "round(per_token * tokens) + (attended or 0)",
        "round(per_token * tokens)",
        ("evaluation/test_operations.py",),
    ),
    Mutant(
        "an expert is counted as if every token came to it",
        "evaluation/operations.py",
        "return chosen / experts if experts and chosen else 1.0",
        "return 1.0",
        ("evaluation/test_operations.py",),
    ),
    Mutant(
        "the error of a difference is that of independent scores",
        "evaluation/tasks.py",
        "(each - mean) ** 2 for each in apart",
        "each**2 for each in (*first.by_example, *second.by_example)",
        ("evaluation/test_tasks.py::test_the_error_of_a_paired_difference",),
    ),
    Mutant(
        "a row of a comparison does not depend on its recipe",
        "stages/comparing.py",
        '"recipe": recipe.model_dump(mode="json", exclude={"output"}), "files"',
        '"recipe": str(cell.way), "files"',
        ("flows/test_compare.py",),
    ),
    Mutant(
        "a row of a comparison does not depend on what its calibration text holds",
        "stages/comparing.py",
        'exclude={"output"}), "files": files',
        'exclude={"output"})',
        ("flows/test_compare.py",),
    ),
    Mutant(
        "the vertical axis of a chart is never by ratio",
        "reports/charts.py",
        "scale = math.log if log else float",
        "scale = float",
        ("reports/test_page.py::test_a_chart_puts_points_where_they_belong",),
    ),
    Mutant(
        "a page that was added later is not on the list of files",
        "checkpoints/output.py",
        "file.name: file.stat().st_size}, indent=2",
        "file.name: 0}, indent=2",
        ("reports/test_page.py::test_a_report_holds_every_part_and_fetches_nothing",),
    ),
    Mutant(
        "what an expert saw is never mixed with its peers",
        "statistics/pools.py",
        "    if count is None or count >= d:\n        return own\n    return",
        "    if count is None or count >= 0:\n        return own\n    return",
        ("statistics/test_pools.py",),
    ),
    Mutant(
        "weights stay cast after their block has run",
        "models/streaming.py",
        "            held[name] = tensor\n",
        "            pass\n",
        ("models/test_streaming.py",),
    ),
    Mutant(
        "hidden states stay in memory whatever the mode",
        "stages/measuring.py",
        'hidden_gb=0.0 if work.memory == "disk" else HIDDEN_GB',
        "hidden_gb=HIDDEN_GB",
        ("models/test_streaming.py::test_disk_leaves_no_hidden_states_in_memory",),
    ),
    Mutant(
        "a gradient that was left behind is gone on with though more is wanted above it",
        "statistics/by_block.py",
        "        if any(wanted[int(index) :]):\n            return top, None\n",
        "",
        ("statistics/test_by_block.py",),
    ),
    Mutant(
        "what an expert saw is lost when it takes no token of the batch a group ends with",
        "statistics/watch.py",
        "        if self._grouping.ended:\n            self._take(kept)",
        "        return",
        ("statistics/test_pools.py",),
    ),
    Mutant(
        "losses count as if all tokens came to every expert",
        "stages/outlooks.py",
        "return 1.0 if reach is None else reach.counted",
        "return 1.0 if reach is not None else 1.0",
        ("statistics/test_pools.py::test_a_run_says_which_experts_saw_little_and_spends_less_on_them",),
    ),
    Mutant(
        "an expert that no token of the first sequence reached is no site",
        "models/sites.py",
        "if site.name not in group_of and site.pool in of_pool:",
        "if site.name not in group_of and site.pool not in of_pool:",
        ("models/test_experts.py::test_an_expert_without_a_token_stays_a_site_and_shares_inputs_as_its_peers",),
    ),
    Mutant(
        "rows of gate and up are taken as halves where they take turns",
        "models/experts.py",
        '    return {"gate_proj": slice(0, rows, 2), "up_proj": slice(1, rows, 2)}',
        '    return {"gate_proj": slice(0, rows // 2), "up_proj": slice(rows // 2, rows)}',
        ("models/test_experts.py::test_every_weight_of_every_expert_is_one_site",),
    ),
    Mutant(
        "mixed ignores the curvature when it fits L R",
        "methods/mixed.py",
        "        return rotation.curvature(curvature)",
        "        return None",
        (f"{OWN_METRIC}::test_mixed_fits_the_loss_and_caldera_the_outputs",),
    ),
    Mutant(
        "ASVD ignores activations",
        "methods/asvd.py",
        "inputs=InputMetric(scale.square())",
        "inputs=InputMetric(scale.square() ** 0)",
        (OWN_METRIC,),
    ),
    Mutant(
        "FWSVD ignores the Fisher information",
        "methods/fwsvd.py",
        "decompose(weight, metric=rows)",
        "decompose(weight)",
        (OWN_METRIC,),
    ),
    Mutant(
        "SVD-LLM centres its inputs",
        "methods/svd_llm.py",
        "statistics.of(Moments()).second_moment()",
        "statistics.of(Moments()).covariance()",
        (OWN_METRIC,),
    ),
    Mutant(
        "AFM does not centre its outputs",
        "methods/afm.py",
        "moments.covariance() if statistics.may_add else moments.second_moment()",
        "moments.second_moment()",
        (OWN_METRIC,),
    ),
    Mutant(
        "pooling takes all sequences for one group",
        "statistics/groups.py",
        "frozenset(group_ends(sequences, groups, length))",
        "frozenset([sequences])",
        (OWN_METRIC,),
    ),
    Mutant(
        "curvature that is added in place loses what is above the diagonal",
        "statistics/curvature.py",
        "total[:, :start, start:stop] += panel[:, :, :start].mT",
        "total[:, :start, start:stop] += 0",
        ("statistics/test_precision.py",),
    ),
    Mutant(
        "blocks that do nothing are taken to be handed what all others are",
        "models/blocks.py",
        "return all(_alike(found.get(index), self._arguments[index, size]) for index in range(len(self.blocks)))",
        "return True",
        ("models/test_learning_blocks.py",),
    ),
    Mutant(
        "a bias lets padding into a state",
        "stages/seeing.py",
        "replace(site, keeps_zeros=True) if site.name in silent else site",
        "site",
        ("models/test_padding.py",),
    ),
    Mutant(
        "a method of one's own adds a bias where zeros have to stay",
        "methods/base.py",
        "basis if statistics.may_add else replace(basis, mean_output=None, mean_code=None)",
        "basis",
        ("models/test_padding.py",),
    ),
    Mutant(
        "what comes of padding is not asked",
        "models/padding.py",
        "        if zeros.get(site.name):",
        "        if zeros.get(site.name) and not site.name:",
        ("models/test_padding.py",),
    ),
    Mutant(
        "blocks are tried on one text at a time",
        "models/blocks.py",
        "beside, other = self.run(index, beside), self.run(index, other)",
        "beside = self.run(index, beside)",
        ("models/test_unusual_layers.py",),
    ),
    Mutant(
        "what a block is handed may depend on the tokens",
        "models/blocks.py",
        "if not _alike(arguments, self._arguments[index, size]):",
        "if False:",
        ("repair/test_repair.py::test_a_block_that_is_told_the_tokens_cannot_run_alone",),
    ),
    Mutant(
        "how often a block runs in a pass is not asked",
        "models/blocks.py",
        "if ran != list(self.blocks):",
        "if not ran:",
        ("models/test_unusual_layers.py",),
    ),
    Mutant(
        "two_sided ignores the curvature",
        "methods/two_sided.py",
        "outputs=seen.outputs, metric=metric)",
        "outputs=seen.outputs)",
        (OWN_METRIC,),
    ),
    Mutant(
        "damping is left in the energies of two_sided",
        "methods/two_sided.py",
        "energy=found.energy * share)",
        "energy=found.energy)",
        (OWN_METRIC,),
    ),
    Mutant(
        "bolaco loses its bias",
        "methods/bolaco.py",
        "seen.mean_output if self.bias else None",
        "None",
        (OWN_METRIC,),
    ),
    Mutant(
        "two_sided loses its bias",
        "methods/two_sided.py",
        "seen.mean_output if biased else None",
        "None",
        (OWN_METRIC,),
    ),
    Mutant(
        "a layer's own bias is lost where the mean is made up for",
        "factors.py",
        "bias = compensation if bias is None else bias.to(compensation) + compensation",
        "bias = compensation",
        (OWN_METRIC,),
    ),
    Mutant(
        "mixed fits a cut in numbers as CALDERA does",
        "methods/mixed.py",
        "        if cut.coded:\n",
        "        if not cut.dense:\n",
        (OWN_METRIC,),
    ),
    Mutant(
        "L R of CALDERA ignores the Hessian",
        "methods/caldera.py",
        "self._metric = InputMetric(hessian.matrix)",
        "self._metric = InputMetric(torch.eye(len(hessian.matrix)).to(hessian.matrix))",
        (OWN_METRIC,),
    ),
    Mutant(
        "CALDERA keeps the last of its turns, not the best",
        "methods/caldera.py",
        "if errors.index(min(errors)) == len(errors) - 1:",
        "if True:",
        ("quantizers/test_quantizers.py::test_the_best_iteration_is_kept_and_its_error_is_that_of_the_weight",),
    ),
    Mutant(
        "truncating keeps one component too few",
        "factors.py",
        "        left, right = self.left[:, :rank], self.right[:rank]\n",
        "        rank = max(1, rank - 1)\n        left, right = self.left[:, :rank], self.right[:rank]\n",
        (OWN_METRIC,),
    ),
    Mutant(
        "codes are read without their scale",
        "quantizers/codebooks.py",
        "return (values * wide_scale(self.scale, self.group, values.shape[1]))[:, : self.columns]",
        "return values[:, : self.columns]",
        ("quantizers/test_quantizers.py::test_each_further_bit_of_the_lattice_costs_less_than_a_scalar_quantiser",),
    ),
    Mutant(
        "rounding feeds no error back inside a panel",
        "quantizers/ldlq.py",
        "wanted = wanted + errors[:, first:start] @ feedback[first:start, start:stop]",
        "wanted = wanted + 0",
        ("quantizers/test_quantizers.py::test_feedback_beats_rounding_to_the_nearest",),
    ),
    Mutant(
        "rounding feeds no error back from one panel to the next",
        "quantizers/ldlq.py",
        "panel = target[:, first:last] + errors[:, :first] @ feedback[:first, first:last]",
        "panel = target[:, first:last]",
        ("quantizers/test_quantizers.py::test_feedback_leaves_only_what_each_rounding_misses",),
    ),
    Mutant(
        "a grid point of the wrong parity is taken for a codeword",
        "quantizers/lattice.py",
        "    low.scatter_add_(-1, place, torch.copysign(odd[..., None], beyond.gather(-1, place)))\n",
        "",
        ("quantizers/test_quantizers.py::test_the_nearest_codeword_is_the_nearest_of_all",),
    ),
    Mutant(
        "a long vector is rounded as if it were short",
        "quantizers/lattice.py",
        "    if len(longer):\n        number[longer]",
        "    if len(longer) < 0:\n        number[longer]",
        ("quantizers/test_quantizers.py::test_the_nearest_codeword_is_the_nearest_of_all",),
    ),
    Mutant(
        "where all patterns are tried a wrong parity costs nothing",
        "quantizers/lattice.py",
        "torch.where(wrong, 2 * least, 0.0)).max(-1)",
        "0.0).max(-1)",
        ("quantizers/test_quantizers.py::test_the_nearest_codeword_is_the_nearest_of_all",),
    ),
    Mutant(
        "two outputs may be sent to one place",
        "checkpoints/load.py",
        "if not torch.equal(there, torch.arange(len(buffer), device=there.device)):",
        "if there[-1] >= len(buffer):",
        ("checkpoints/test_verify.py",),
    ),
    Mutant(
        "weights that are rounded together take the codes of one another",
        "quantizers/ldlq.py",
        "    parts = torch.cat(codes, 1).split(rows)\n",
        "    parts = torch.cat(codes, 1).flip(0).split(rows)\n",
        ("quantizers/test_together.py::test_weights_are_rounded_together_as_each_alone",),
    ),
    Mutant(
        "errors of the rows above are not fed back",
        "quantizers/two_sided.py",
        "wanted = (weight + above + before) / unit",
        "wanted = (weight + before) / unit",
        ("quantizers/test_two_sided.py::test_blocks_are_rounded_where_the_errors_of_those_before_put_them",),
    ),
    Mutant(
        "what the rows above moved is not fed back along the inputs",
        "quantizers/two_sided.py",
        "= missed + above\n",
        "= missed\n",
        ("quantizers/test_two_sided.py::test_blocks_are_rounded_where_the_errors_of_those_before_put_them",),
    ),
    Mutant(
        "codes are expected to lose what they lose without feedback along the outputs",
        "methods/quantize.py",
        "found[q_bits] = left * rounding.loss(known, trace, spread)",
        "found[q_bits] = rounding.loss(known, trace, spread)",
        ("methods/test_estimates.py::test_estimates_are_near_what_codes_lose",),
    ),
    Mutant(
        "errors are fed back along the inputs alone",
        "methods/quantizing.py",
        "return self.output_feedback and self.feedback and not self.passes",
        "return False",
        ("methods/test_own_metric.py::test_codes_by_both_metrics_lose_less_than_those_by_the_hessian",),
    ),
    Mutant(
        "a method made of another one is fitted as that",
        "methods/quantize.py",
        "        return type(self).fit is Quantize.fit and not self.feeds_outputs\n",
        "        return not self.feeds_outputs\n",
        ("quantizers/test_together.py::test_a_method_that_fits_in_its_own_way_is_asked_for_every_site",),
    ),
    Mutant(
        "grouped layers are taken apart untried",
        "models/unfusing.py",
        "            same[type(module)] = _maps_the_same(module)\n",
        "            same[type(module)] = True\n",
        ("models/test_grouped.py::test_what_only_looks_like_groups_is_left",),
    ),
    Mutant(
        "a state space's output counts as that of attention",
        "models/places.py",
        '"out_proj": ("in_proj",), ',
        "",
        ("allocation/test_allocation.py::test_the_role_of_a_site_is_read_off_its_name_and_those_beside_it",),
    ),
    Mutant(
        "grouped experts are counted as if every token came to each",
        "evaluation/operations.py",
        "share if name in routed or ",
        "share if ",
        ("models/test_grouped.py::test_operations_of_experts_count_by_the_tokens_that_come_to_them",),
    ),
    Mutant(
        "a site draws the same whatever the seed",
        "stages/at_site.py",
        'f"{work.recipe.seed}:{site.name}"',
        'f"{site.name}"',
        ("stages/test_keys.py",),
    ),
    Mutant(
        "all sites draw the same",
        "stages/at_site.py",
        'f"{work.recipe.seed}:{site.name}"',
        'f"{work.recipe.seed}"',
        ("stages/test_keys.py",),
    ),
    Mutant(
        "sequences are chosen the same whatever the seed",
        "data/sequences.py",
        "torch.Generator().manual_seed(seed)",
        "torch.Generator().manual_seed(0)",
        ("data/test_data.py::test_choosing_is_seeded_ordered_and_without_replacement",),
    ),
    Mutant(
        "labels are sampled the same whatever the seed",
        "statistics/labels.py",
        "seed * 1_000_003 + start",
        "start",
        ("statistics/test_statistics.py",),
    ),
    Mutant(
        "sampled labels are the text's",
        "statistics/labels.py",
        'draws = None if labels == "text" else',
        "draws = None if labels else",
        ("statistics/test_statistics.py",),
    ),
    Mutant(
        "finished statistics are taken for those of another seed",
        "stages/keys.py",
        '"calibration": calibration, "seed": work.recipe.seed}',
        '"calibration": calibration}',
        ("stages/test_keys.py",),
    ),
    Mutant(
        "finished statistics are taken for those of another batch size",
        "stages/keys.py",
        ', "batch_size": settings.batch_size}',
        "}",
        ("stages/test_keys.py",),
    ),
    Mutant(
        "finished statistics are taken for those of other groups",
        "statistics/base.py",
        "f.name: getattr(self, f.name) for f in dataclasses.fields(fields)}",
        'f.name: getattr(self, f.name) for f in dataclasses.fields(fields) if f.name != "groups"}',
        ("statistics/test_adding.py::test_every_setting_is_in_the_key",),
    ),
    Mutant(
        "a fit is taken for that of other bits of L and R",
        "stages/fitting.py",
        '{cut.q_bits}-{cut.rank}-{cut.lr_bits}.safetensors"',
        '{cut.q_bits}-{cut.rank}.safetensors"',
        ("stages/test_keys.py",),
    ),
    Mutant(
        "a fit is taken for that of another rank",
        "stages/fitting.py",
        '{cut.q_bits}-{cut.rank}-{cut.lr_bits}.safetensors"',
        '{cut.q_bits}-{cut.lr_bits}.safetensors"',
        ("stages/test_keys.py",),
    ),
    Mutant(
        "a stage file of other contents is taken over",
        "runs/folder.py",
        'if _hash(file) != known["sha256"]:',
        "if False:",
        ("runs/test_folder.py", "stages/test_damage.py"),
    ),
    Mutant(
        "a file that is gone is not said",
        "runs/folder.py",
        "            if wrong is not None:\n                return f",
        "            if wrong is None:\n                return f",
        ("runs/test_folder.py",),
    ),
    Mutant(
        "a line is not tied to the one before it",
        "runs/lines.py",
        'f"{before}{json.dumps(record, sort_keys=True)}"',
        'f"{json.dumps(record, sort_keys=True)}"',
        ("allocation/test_allocation.py::test_a_log_is_taken_over_up_to_where_it_was_harmed",),
    ),
    Mutant(
        "the notes of a stage are not made again",
        "runs/run.py",
        "for note in found.notes:",
        "for note in ():",
        ("runs/test_folder.py", "stages/test_damage.py"),
    ),
    Mutant(
        "a mapped file grows as it is filled",
        "models/blocks.py",
        "    take_space(folder / name, 4 * count)\n",
        "",
        ("runs/test_folder.py::test_the_space_of_a_mapped_file_is_taken_first",),
    ),
    Mutant(
        "a pivoted layer leaves its outputs in the order of storage",
        "layers/pivoted.py",
        "return outputs.gather(-1, self.place.long().expand(outputs.shape))",
        "return outputs",
        ("layers/test_storage.py::test_both_layers_compute_the_same_map",),
    ),
    Mutant(
        "a filled budget is exceeded by one step",
        "allocation/fill.py",
        "torch.where(step <= left,",
        "torch.where((left > 0) & step.isfinite(),",
        ("sizes/test_budget.py::test_a_filled_budget_is_never_exceeded_and_leaves_less_than_one_step",),
    ),
    Mutant(
        "the integers of an order are not counted",
        "sizes/form.py",
        "return rank * (m + n - rank) + (m if",
        "return rank * (m + n - rank) + (0 if",
        ("sizes/test_budget.py::test_no_storage_costs_more_than_it_must",),
    ),
    Mutant(
        "the divergence is taken the other way round",
        "evaluation/predictions.py",
        'original = self._logits.of(part).float().log_softmax(-1)\n        if direction == "compressed_original":',
        'original = self._logits.of(part).float().log_softmax(-1)\n        if direction != "compressed_original":',
        ("evaluation/test_objective.py",),
    ),
    Mutant(
        "the divergence of the top k is taken the other way round",
        "evaluation/predictions.py",
        'rest = _rest(kept)\n        if direction == "compressed_original":',
        'rest = _rest(kept)\n        if direction != "compressed_original":',
        ("evaluation/test_objective.py",),
    ),
    Mutant(
        "a plan is taken for a model of other shapes",
        "sizes/plan.py",
        "if there != shape:",
        "if there is None:",
        ("allocation/test_allocation.py::test_plans_remember_what_they_were_made_for",),
    ),
    Mutant(
        "labels are not drawn, but the likeliest are taken",
        "statistics/labels.py",
        "return torch.searchsorted(sums, wanted, right=True).squeeze(-1).clamp_max_(logits.shape[-1] - 1)",
        "return logits.argmax(-1)",
        ("statistics/test_statistics.py",),
    ),
    Mutant(
        "every batch draws the same labels",
        "statistics/labels.py",
        "seed * 1_000_003 + start",
        "seed * 1_000_003",
        ("statistics/test_statistics.py",),
    ),
    Mutant(
        "an outlook is taken for that of other settings",
        "stages/looked.py",
        '{**key, "method": method.model_dump(exclude=set(method.unseen))}',
        '{**key, "method": method.name}',
        ("stages/test_keys.py",),
    ),
    Mutant(
        "looks and fits do not know how much of the curvature was kept",
        "stages/measuring.py",
        '    return {**calibration_key(work), **({"shared": found} if found else {})}',
        "    return calibration_key(work)",
        ("stages/test_keys.py",),
    ),
    Mutant(
        "a fit is taken for that of other settings",
        "stages/fitting.py",
        'method.model_dump(exclude={"q_bits", "rank"})',
        "method.name",
        ("stages/test_keys.py",),
    ),
    Mutant(
        "a shard draws the labels of the first sequences",
        "statistics/passes.py",
        "backward(head(batch), batch, labels, seed, first + start)",
        "backward(head(batch), batch, labels, seed, start)",
        ("statistics/test_shards.py",),
    ),
    Mutant(
        "a shard may cut a group of sequences",
        "statistics/shards.py",
        "places &= {*ends, *range(count, sequences)}",
        "pass",
        ("statistics/test_shards.py",),
    ),
    Mutant(
        "finished statistics are taken for those of gradients at fewer sequences",
        "stages/keys.py",
        'calibration["gradient_sequences"] = work.gradient_sequences',
        "pass",
        ("stages/test_keys.py",),
    ),
    Mutant(
        "a proposal knows what is not finished yet",
        "allocation/search.py",
        "finished = trial - ahead + 1",
        "finished = trial",
        ("allocation/test_allocation.py",),
    ),
    Mutant(
        "a layer that makes something else of its weight is a site",
        "models/sites.py",
        "if _routes(path, module, experts) or not gives_product(module) or _weight_id(module) in shared:",
        "if _routes(path, module, experts) or _weight_id(module) in shared:",
        ("models/test_unusual_layers.py",),
    ),
    Mutant(
        "a layer whose weight other blocks share is a site",
        "models/sites.py",
        "not gives_product(module) or _weight_id(module) in shared:",
        "not gives_product(module):",
        ("models/test_sites.py::test_layers_that_share_a_weight_are_no_sites",),
    ),
    Mutant(
        "an architecture whose layers differ by themselves is built as if all were alike",
        "models/resizing.py",
        'pop("_heterogeneity_spec", None) if resized else None',
        'pop("_heterogeneity_spec", None)',
        ("models/test_unusual_layers.py::test_an_unusual_family_is_compressed_with_gradients_and_reloaded",),
    ),
    Mutant(
        "layers of ours are filled by the original, which may know them by their paths",
        "layers/replace.py",
        'if hasattr(module, "stands_for_another"):',
        "if False:",
        ("models/test_unusual_layers.py::test_an_unusual_family_is_compressed_with_gradients_and_reloaded",),
    ),
    Mutant(
        "an expert maps rows of zeros, of tokens that it is not to see",
        "models/experts.py",
        "mine = rows.any(-1).nonzero()[:, 0]",
        "mine = torch.arange(len(rows))",
        ("models/test_expert_layouts.py::test_a_token_that_an_expert_is_not_to_see_stays_zero",),
    ),
    Mutant(
        "a quantised layer reads L and R past what hangs on them",
        "layers/quantized.py",
        "parts.append(self.left(self.right(x)))",
        "parts.append((x @ self.right.weight.to(x.dtype).T) @ self.left.weight.to(x.dtype).T)",
        ("layers/test_children.py",),
    ),
    Mutant(
        "a weight kept dequantised hides an adapter",
        "layers/quantized.py",
        "return all(type(part) in (StoredLinear, PackedMatrix) for part in parts if part is not None)",
        "return len(parts) > 0",
        ("layers/test_children.py::test_what_peft_adapts_learns",),
    ),
    Mutant(
        "parents of one class whatever is replaced in them",
        "layers/replace.py",
        "replaced = tuple((name, kinds[type(child)]) for",
        "replaced = tuple(('', kinds[type(child)]) for",
        ("layers/test_parents.py",),
    ),
    Mutant(
        "buffers that a model fills in its children are left to chance",
        "layers/replace.py",
        "setattr(self, name, lambda: False)",
        "setattr(self, name, lambda: True)",
        ("models/test_reloading.py::test_every_family_reloads_the_same",),
    ),
    Mutant(
        "all scale stays in L",
        "linalg/decompose.py",
        "return torch.where(usable, doublings, torch.zeros_like(doublings)).exp2().to(left.dtype)",
        "return torch.zeros_like(doublings).exp2().to(left.dtype)",
        ("layers/test_range.py",),
    ),
    Mutant(
        "tensors within the decoder are left out with a note",
        "checkpoints/sources.py",
        "(within if known else outside).append(name)",
        "outside.append(name)",
        ("checkpoints/test_sources.py",),
    ),
    Mutant(
        "zero inputs decide by an arbitrary basis",
        "linalg/decompose.py",
        "        inputs = outputs = None\n",
        "        pass\n",
        ("methods/test_zeros.py",),
    ),
    Mutant(
        "a refit sees the pass that learns what blocks are handed",
        "repair/refit.py",
        "    runner.learn(len(hidden))  # Runs",
        "    # Runs",
        ("repair/test_repair.py::test_a_killed_repair_goes_on_with_the_next_block",),
    ),
    Mutant(
        "a checkpoint may hold other tensors than the model",
        "checkpoints/reload.py",
        "if here.get(tensor) != there.get(tensor):",
        "if False:",
        ("checkpoints/test_reload.py",),
    ),
    Mutant(
        "an output has many writers",
        "checkpoints/output.py",
        "fcntl.LOCK_EX | fcntl.LOCK_NB",
        "fcntl.LOCK_SH | fcntl.LOCK_NB",
        ("checkpoints/test_output.py",),
    ),
    Mutant(
        "the gradient of a part is that of the first",
        "models/head.py",
        "gradient[part] = torch.autograd.grad",
        "gradient[:] = torch.autograd.grad",
        ("models/test_head.py",),
    ),
    Mutant(
        "references in YAML may multiply",
        "reading.py",
        "self._nodes += self._sizes[id(node)]",
        "self._nodes += 1",
        ("package/test_reading.py",),
    ),
    Mutant(
        "a tensor may lie anywhere in its file",
        "checkpoints/verify.py",
        "if start != end or",
        "if",
        ("checkpoints/test_verify.py",),
    ),
    Mutant(
        "pipes are signs of a table",
        "reports/escaping.py",
        "[\\\\`*\\[\\]<>|~&#!$]",
        "[\\\\`*\\[\\]<>~&#!$]",
        ("reports/test_escaping.py",),
    ),
    Mutant(
        "a recipe alone runs code",
        "cli/options.py",
        "not in (None, False) and not trusted",
        "not in (None, False, True) and not trusted",
        ("cli/test_boundary.py::test_a_recipe_alone_may_not_run_code",),
    ),
    Mutant(
        "a start token is part of a text that is cut anew",
        "evaluation/perplexity.py",
        "rows = ids[:, length - text :].flatten()",
        "rows = ids.flatten()",
        ("data/test_start.py::test_windows_that_overlap_begin_with_it_once_and_score_every_token",),
    ),
    Mutant(
        "auto adds no start token",
        "data/start.py",
        "return whole[:1] == [token] and bare[:1] != [token]",
        "return False",
        ("data/test_start.py",),
    ),
    Mutant(
        "a failure forgets its stage",
        "progress.py",
        "outer, self.current = self.current, name",
        "outer = self.current",
        ("cli/test_boundary.py::test_what_nobody_foresaw_names_stage_and_architecture_and_leaves_a_file",),
    ),
    Mutant(
        "pruning: what stays makes up for nothing",
        "linalg/removal.py",
        "return weight[:, stays] + weight[:, goes] @ along.T",
        "return weight[:, stays] + 0 * weight[:, goes] @ along.T",
        ("linalg/test_removal.py",),
    ),
    Mutant(
        "pruning: the order of units does not feel the loss",
        "methods/pruned.py",
        "order = removal_order(_felt(weight, statistics.of(self._curvature)), covariance,",
        "order = removal_order(weight, covariance,",
        ("methods/test_unit_scores.py",),
    ),
    Mutant(
        "pruning: scores of layers are compared as they are",
        "methods/flap.py",
        "score = (score - score.mean()) / spread if float(spread) > 0 else score * 0",
        "score = score * 1.0",
        ("methods/test_unit_scores.py",),
    ),
    Mutant(
        "pruning: the bias for what went is lost",
        "methods/pruning.py",
        "extra = weight @ mean - made @ mean[inputs]",
        "extra = 0 * (weight @ mean - made @ mean[inputs])",
        ("methods/test_unit_scores.py",),
    ),
    Mutant(
        "pruning: a search takes shares below the plan's for shares above it",
        "allocation/units.py",
        "if share <= planned:",
        "if share < 0:",
        ("allocation/test_units.py",),
    ),
    Mutant(
        "repair: adapters are put on what is left out",
        "stages/repairing.py",
        'if site.name not in work.left_out] if step == "lora"',
        'if site.name] if step == "lora"',
        ("repair/test_lora_step.py::test_weights_that_are_undone_or_left_out_are_as_they_were",),
    ),
    Mutant(
        "repair: what lost units is judged by itself",
        "stages/smaller.py",
        "return replace(made, judge=judge.of(made.loaded.model))",
        "return made",
        ("repair/test_lora_step.py::test_what_lost_units_is_judged_by_the_original",),
    ),
    Mutant(
        "pruning: couplings are believed untried",
        "models/shrinking.py",
        "<= tolerance * float(before.norm()) + 1e-6:",
        "<= 1e9 * float(before.norm()) + 1e-6:",
        ("models/test_couplings.py",),
    ),
    Mutant(
        "decoder blocks are the largest list of the whole model",
        "models/sites.py",
        "path, decoder = language_model(model)",
        'path, decoder = "", model',
        ("models/test_language_model.py::test_a_large_vision_tower_is_not_taken_for_the_decoder",),
    ),
    Mutant(
        "a checkpoint is tried on text alone",
        "checkpoints/reload.py",
        "if image := image_inputs(model, ids):",
        "if image := {}:",
        ("flows/test_vision_language.py::test_a_checkpoint_that_sees_otherwise_is_never_there",),
    ),
    Mutant(
        "a processor stays behind",
        "checkpoints/companions.py",
        "for name, file in found.items():",
        "for name, file in ():",
        ("flows/test_vision_language.py::test_the_processor_goes_along",),
    ),
    Mutant(
        "operations of a vision tower are counted with those of text",
        "evaluation/operations.py",
        'if not path or name.startswith(f"{path}.") or layer is head:',
        "if layer is not None:",
        ("flows/test_vision_language.py::test_operations_are_those_of_text_and_memory_is_told",),
    ),
    Mutant(
        "a layer whose weight the model reads is replaced",
        "models/outside.py",
        "found.add(name)",
        "found.discard(name)",
        ("models/test_outside.py",),
    ),
    Mutant(
        "a codebook of one's own is taken in any version",
        "quantizers/codebooks.py",
        'if version not in ("", code):',
        'if version == "none":',
        ("recipes/test_own_classes.py::test_another_version_of_a_codebook_is_refused_by_name",),
    ),
    Mutant(
        "an allocation of one's own may spend more than the budget",
        "sizes/plan.py",
        "if allowance.sized and plan.kept_bits > allowance.bits:",
        "if allowance.sized and plan.kept_bits < 0:",
        ("recipes/test_own_classes.py::test_a_choice_that_is_none_of_the_problem_is_refused",),
    ),
    Mutant(
        "a recipe runs the code of a codebook unasked",
        "cli/options.py",
        "return [name for value in node.values() for name in code_named(value)]",
        'return code_named(node.get("name"))',
        ("recipes/test_own_classes.py::test_a_recipe_runs_the_code_of_a_codebook_or_an_allocation_only_when_asked_to",),
    ),
    Mutant(
        "paths in a recipe are those of the shell",
        "recipes/paths.py",
        "return os.path.normpath(os.path.join(folder, os.path.expanduser(path)))",
        "return os.path.normpath(os.path.expanduser(path))",
        ("recipes/test_paths.py::test_what_is_a_path_is_seen_from_the_recipe",),
    ),
)


class Bench:
    """A copy of `src`, and tests that run on it.

    Args:
        folder: where the copy is made; an empty one.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._src = folder, folder / "src"
        shutil.copytree(ROOT / "src", self._src, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        # Files that change within a second look unchanged to compiled ones, so none are written.
        self._environment = {**os.environ, "PYTHONPATH": str(self._src), "PYTHONDONTWRITEBYTECODE": "1"}
        code = "import rankwise; print(rankwise.__file__)"
        found = subprocess.run(
            [sys.executable, "-c", code], env=self._environment, cwd=folder, capture_output=True, text=True, check=True
        )
        if not Path(found.stdout.strip()).is_relative_to(self._src):
            raise RuntimeError(f"the tests would run on {found.stdout.strip()}, not on the copy")

    def passes(self, tests: Iterable[str]) -> str:
        """Run tests on what the copy is now, up to the first that fails.

        Returns:
            The name of the test that failed, empty when all pass.

        Raises:
            RuntimeError: when they could not be run.
        """
        report = self._folder / "report.xml"
        report.unlink(missing_ok=True)
        # In a folder of its own, so that no example which a mutant failed is remembered for the package itself.
        options = ["-x", "-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT), "--junitxml", str(report)]
        options += ["-p", "no:cacheprovider", "--hypothesis-seed", "0", "-m", "not slow and not gpu"]
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *options, *(str(ROOT / "tests" / test) for test in tests)],
            env=self._environment,
            cwd=self._folder,
            capture_output=True,
            text=True,
        )
        if done.returncode == 0:
            return ""
        if done.returncode == 1:
            for case in ET.parse(report).iter("testcase"):
                failure = case.find("failure")
                if failure is not None and not failure.get("message", "").startswith(_CANNOT_RUN):
                    file = case.get("classname", "").removeprefix("tests.").replace(".", "/")
                    return f"{file}.py::{case.get('name')}"
        raise RuntimeError(f"the tests cannot be run:\n{done.stdout[-3000:]}{done.stderr[-1000:]}")

    def noticed(self, mutant: Mutant) -> str:
        """The name of the first test that fails on a mutant, empty for none.

        Raises:
            ValueError: when the mutant does not fit its file.
            RuntimeError: when the tests could not be run.
        """
        file = self._src / "rankwise" / mutant.file
        whole = file.read_text()
        file.write_text(mutant.applied(whole))
        try:
            return self.passes(mutant.tests)
        finally:
            file.write_text(whole)


def main(words: list[str]) -> int:
    """Try the mutants whose names hold one of the words, or all; 0 when every one was noticed."""
    wanted = [mutant for mutant in MUTANTS if not words or any(word in mutant.name for word in words)]
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        bench = Bench(Path(name))
        failed = bench.passes(dict.fromkeys(test for mutant in wanted for test in mutant.tests))
        if failed:
            print(f"{failed} fails without any mutant")
            return 1
        print(f"the tests pass on the package as it is ({time.monotonic() - started:.0f} s)", flush=True)
        missed = 0
        for mutant in wanted:
            begun = time.monotonic()
            try:
                test = bench.noticed(mutant)
                says = f"noticed      {mutant.name}, by {test}" if test else f"NOT NOTICED  {mutant.name}"
            except (ValueError, RuntimeError) as problem:
                test, says = "", f"NOT TRIED    {mutant.name}: {problem}"
            missed += not test
            print(f"{says} ({time.monotonic() - begun:.0f} s)", flush=True)
    print(f"{len(wanted) - missed} of {len(wanted)} mutants noticed in {time.monotonic() - started:.0f} s")
    return int(missed > 0 or not wanted)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
