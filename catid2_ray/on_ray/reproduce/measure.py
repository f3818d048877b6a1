"""Runs one condition: a ranked list of equal length for every test query, with what it cost.

Everything runs in the process that measures, on its threads, so that costs of methods compare. Quantizers and IDs are stages of
the pipeline like any other; vectors of a fine-tuned encoder are an artefact of their own.
"""

import dataclasses
import functools
import hashlib
import io
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch

from catid2_ray.artifacts import manifest as artifact
from catid2_ray.artifacts import release as releases
from catid2_ray.artifacts.manifest import Attempt, Manifest
from catid2_ray.artifacts.stages import STAGES
from catid2_ray.catalog import tuning
from catid2_ray.catalog.pairs import training_pairs
from catid2_ray.catalog.text import HuggingFaceEncoder, join_text
from catid2_ray.config import Recipe
from catid2_ray.docid import DocidSpace
from catid2_ray.errors import InputError, ReleaseError
from catid2_ray.evaluation import proxy
from catid2_ray.evaluation.baselines import bm25
from catid2_ray.evaluation.reproduce import ranking
from catid2_ray.evaluation.reproduce.conditions import Condition
from catid2_ray.evaluation.reproduce.ranking import RETURNED, Ranking
from catid2_ray.on_ray.job import Job
from catid2_ray.on_ray.machine import progress
from catid2_ray.on_ray.machine.arrays import matrix
from catid2_ray.on_ray.machine.query_encoder import open_retriever
from catid2_ray.on_ray.pipeline import RUN, check_codes
from catid2_ray.on_ray.reports import parts_of_kind, variant
from catid2_ray.on_ray.reproduce import costs
from catid2_ray.on_ray.reproduce.bench import Bench, Vectors
from catid2_ray.on_ray.reproduce.costs import cost_of
from catid2_ray.on_ray.reproduce.nearest import Pair, approximate, given, read_file
from catid2_ray.on_ray.stages import adapter, embed, examples, train_generator, tuned_encoder
from catid2_ray.on_ray.stages.evaluate import ahead_of
from catid2_ray.retrieval.trie import Trie

# Parts of a release that a search of it depends on; the others go into these.
_OF_RELEASE = ("ids", "generator", "serving", "mixture", "node_vectors", "examples", "quantizer")


class Measures:
    """Ranks the products for one condition after the other; what several need (indexes, vectors) is made once.

    `job`: of the recipe with its sizes; `parts`: catalogue, pairs, embeddings and adapter of the recipe itself."""

    def __init__(self, job: Job, parts: dict[str, Manifest], bench: Bench):
        self.job, self.parts, self.bench = job, parts, bench
        self._lexical: dict[str, tuple[bm25.Bm25, dict, float]] = {}
        self.ids: dict[str, Manifest] = {}  # by their digests, those that conditions were made of
        self._embedded: dict[str, tuple[Job, dict[str, Manifest]]] = {}

    # What a condition is made of

    def recipe_of(self, condition: Condition, seed: int) -> Recipe:
        """The recipe with the condition's changes and seed; RecipeError where they contradict it."""
        recipe = self.job.recipe
        if condition.kind:
            recipe = variant(recipe, condition.kind, seed)
        values = recipe.model_dump(mode="json") | {"seed": seed}
        budget = recipe.reproduce
        changes = dict(condition.recipe)
        if changes.get("embedding.encoder", recipe.embedding.encoder) != recipe.embedding.encoder:
            changes["serving.query_encoder"] = None  # it goes with the recipe's own encoder
        if condition.printed:
            changes |= {
                f"quantizer.{name}": value
                for name, value in (("epochs", budget.printed_epochs), ("learning_rate", budget.printed_learning_rate))
                if value is not None
            }
        levels = changes.pop("levels", None)
        if "levels_beyond_categories" in changes:
            levels = recipe.catalog.max_category_depth + changes.pop("levels_beyond_categories")
        if levels is not None:
            codes = changes.get("quantizer.codes_per_level", recipe.quantizer.codes_per_level)
            changes["quantizer.codes_per_level"] = [codes[0]] * levels
        for path, value in changes.items():
            section, name = path.split(".")
            values[section] = {**values[section], name: value}
        return Recipe.build(values)

    def embedded(self, recipe: Recipe) -> tuple[Job, dict[str, Manifest]]:
        """Catalogue, pairs, embeddings and adapter of a recipe, with those of the recipe of the job where they are alike. All seeds
        share the embeddings of the job's own seed."""
        if recipe.embedding.identity() == self.job.recipe.embedding.identity():
            return self.job, self.parts
        key = recipe.embedding.model_dump_json()
        if key not in self._embedded:
            sections = {"embedding": recipe.embedding, "serving": recipe.serving}
            job = dataclasses.replace(self.job, recipe=self.job.recipe.model_copy(update=sections))
            parts = {name: self.parts[name] for name in ("catalog", "pairs")}
            if (made := tuned_encoder.run(job, parts)) is not None:
                parts["tuned_encoder"] = made
            parts["embeddings"] = embed.run(job, parts)
            if (made := adapter.run(job, parts)) is not None:
                parts["adapter"] = made
            self._embedded[key] = (job, parts)
        return self._embedded[key]

    def settings(self, condition: Condition, seed: int) -> tuple[dict, dict[str, Manifest]]:
        """What names the condition's cell beside its parents, and the parents: artefacts that its ranking is made from.

        Raises what the condition meets where it cannot be measured at all."""
        evaluation = self.job.recipe.evaluation
        asked = {
            "split": evaluation.split,
            "min_relevance": evaluation.min_relevance,
            "max_queries": evaluation.max_queries,
        }
        settings = {"family": condition.family, **condition.settings, **asked, "returned": RETURNED, "version": 1}
        settings["seed"] = seed if condition.seeded else self.job.recipe.seed
        if condition.missing:
            raise InputError(condition.missing)
        if evaluation.max_queries:  # the recipe's seed draws them, and the seed here is the method's
            settings["queries"] = _digest(self.bench.judged["test"].query_ids)
        if self.parts["catalog"].metrics["width"] and any(path.startswith("embedding.") for path in condition.recipe):
            raise InputError("the catalogue brings its own vectors, so no other encoder or text is embedded")
        parents = {name: self.parts[name] for name in ("catalog", "pairs")}
        if condition.family == "run":
            settings["sha256"] = hashlib.sha256(read_file(self.job.recipe.reproduce.runs[condition.name])).hexdigest()
        if condition.family == "release":
            released = self._released(condition, seed)
            parents |= {name: released[name] for name in _OF_RELEASE if name in released}
            settings |= {"searched": "release"} | ({"ahead": self._ahead(released)} if settings.get("ahead") else {})
        if condition.family in ("dense", "fusion", "ids", "generator"):
            recipe = self.recipe_of(condition, seed)
            job, parts = self.embedded(recipe)
            names = ("embeddings", "adapter")
            parents |= {
                name: parts[name] for name in names if name in parts and (name != "adapter" or costs.adapts(condition))
            }
            if costs.fine_tunes(condition):
                settings["dpr"] = self._dpr_settings()
            if condition.family in ("ids", "generator"):
                check_codes(recipe, self.parts["catalog"])
                of_kind = parts_of_kind(of_recipe := dataclasses.replace(job, recipe=recipe), parts)
                self.ids[of_kind["ids"].digest] = of_kind["ids"]
                parents |= {name: of_kind[name] for name in ("quantizer", "ids")}
            if condition.family == "generator":
                of_kind["examples"] = examples.run(of_recipe, of_kind)
                parents |= {"examples": of_kind["examples"], "generator": train_generator.run(of_recipe, of_kind)}
            if condition.family == "ids":
                generator = job.recipe.generator
                settings |= {"proxy": [proxy.HIDDEN, proxy.EPOCHS, proxy.BATCH, proxy.LEARNING_RATE],
                             "teaches": [generator.min_relevance, generator.relevance_weights]}  # fmt: skip
        return settings, parents

    def rank(self, condition: Condition, seed: int, parents: dict[str, Manifest]) -> Ranking:
        family: Callable[..., Ranking] = getattr(self, f"_{condition.family}_ranking")
        return family(condition, seed, parents)

    def with_shared(self, condition: Condition, cost: dict, parents: dict[str, Manifest]) -> dict:
        """The cost with what methods share, counted for each: `costs.with_shared`."""
        if condition.family in ("run", "lexical"):
            return cost
        _, shared = self.embedded(self.recipe_of(condition, self.job.recipe.seed))
        return costs.with_shared(condition, cost, shared | parents)

    def _run_ranking(self, condition: Condition, seed: int, parents) -> Ranking:
        return given(self.job.recipe.reproduce.runs[condition.name], self.bench)

    # Words

    def _index(self, name: str) -> tuple[bm25.Bm25, dict, float]:
        """The index of plain BM25, of the tuned one, or of words between blanks; what was chosen; seconds to build it."""
        if name not in self._lexical:
            ids, texts, start = self.bench.product_ids, self.bench.texts(), time.monotonic()
            chosen: dict = {}
            if name == "tuned":
                validation, words = self.bench.asked("validation"), functools.cache(bm25.plain_words)
                index, chosen = ranking.tune_bm25(
                    lambda k1, b: bm25.Bm25(ids, texts, k1=k1, b=b, words=words), validation
                )
            else:
                index = bm25.Bm25(ids, texts, words=ranking.blanks if name == "blanks" else bm25.plain_words)
            self._lexical[name] = (index, chosen, time.monotonic() - start)
        return self._lexical[name]

    def _lexical_ranking(self, condition: Condition, seed: int, parents) -> Ranking:
        name = "tuned" if condition.settings.get("tuned") else str(condition.settings.get("words", "plain"))
        index, chosen, seconds = self._index(name)
        rows_QC, milliseconds = ranking.ranked_by(
            ranking.lexical_scores(index, self._texts), len(self._texts), above=0.0
        )
        return Ranking(rows_QC, cost_of(0.0, seconds, milliseconds, index.nbytes), chosen)

    @property
    def _texts(self) -> list[str]:
        return self.bench.judged["test"].queries

    # Vectors

    def _pair(self, condition: Condition, seed: int) -> Pair:
        """Queries' and products' vectors: as they are, adapted or fine-tuned."""
        job, parts = self.embedded(self.recipe_of(condition, seed))
        if costs.fine_tunes(condition):
            return self._dpr(job, parts, seed)
        vectors, embedding = self.bench.vectors(job, parts), parts["embeddings"].metrics["seconds"]
        if costs.adapts(condition):
            if vectors.adapter is None:
                raise InputError(f"there is no adapter: {_why_no_adapter(job, parts)}")
            seconds = parts["adapter"].metrics["seconds"]
            return Pair(vectors.adapted_queries, vectors.adapted(), seconds, embedding, lambda: vectors.milliseconds)
        return Pair(vectors.queries, vectors.product_ND, 0.0, embedding, lambda: vectors.milliseconds)

    def _dense_ranking(self, condition: Condition, seed: int, parents) -> Ranking:
        pair = self._pair(condition, seed)
        query_QD, encoding = pair.queries(self._texts), pair.milliseconds()
        if index := condition.settings.get("faiss"):
            return approximate(str(index), query_QD, pair, encoding)
        scores = ranking.dense_scores(query_QD, pair.product_ND)
        rows_QC, milliseconds = ranking.ranked_by(scores, len(self._texts))
        return Ranking(rows_QC, cost_of(pair.train, pair.index, encoding + milliseconds, pair.product_ND.nbytes), {})

    def _fusion_ranking(self, condition: Condition, seed: int, parents) -> Ranking:
        """BM25 tuned and a cosine, added with the weight that finds most on validation."""
        index, lexical_choice, seconds = self._index("tuned")
        pair, validation = self._pair(condition, seed), self.bench.asked("validation")
        chosen = ranking.tune_weight(
            ranking.lexical_scores(index, validation.texts),
            ranking.dense_scores(pair.queries(list(validation.texts)), pair.product_ND), validation,
        )  # fmt: skip
        query_QD, encoding = pair.queries(self._texts), pair.milliseconds()
        scores = ranking.fused_scores(
            ranking.lexical_scores(index, self._texts),
            ranking.dense_scores(query_QD, pair.product_ND),
            chosen["weight"],
        )
        rows_QC, milliseconds = ranking.ranked_by(scores, len(self._texts))
        cost = cost_of(pair.train, pair.index + seconds, encoding + milliseconds, pair.product_ND.nbytes + index.nbytes)
        return Ranking(rows_QC, cost, chosen | {name: lexical_choice[name] for name in ("k1", "b")})

    # A fine-tuned encoder

    def _dpr_settings(self) -> dict:
        budget, generator = self.job.recipe.reproduce, self.job.recipe.generator
        return {
            "queries": _digest(self._all_queries()),  # the artefact holds their vectors
            "epochs": budget.dpr_epochs, "pairs": budget.dpr_pairs,
            "batch": budget.dpr_batch, "learning_rate": budget.dpr_learning_rate, "min_relevance": generator.min_relevance,
            "relevance_weights": generator.relevance_weights,
        }  # fmt: skip

    def _dpr(self, job: Job, parts: dict[str, Manifest], seed: int) -> Pair:
        settings = {**self._dpr_settings(), "split": job.recipe.evaluation.split, "seed": seed}
        parents = {name: parts[name] for name in ("catalog", "pairs", "embeddings")}
        digests = {role: parent.digest for role, parent in parents.items()}
        made = artifact.find(job.store, "dpr", artifact.key_of("dpr", settings, digests))
        if made is None:
            made = self._fine_tuned(job, Attempt(job.store, "dpr", settings=settings, parents=digests,
                                                 recipe=job.recipe.model_dump(mode="json")), seed)  # fmt: skip
        product_ND, query_QD = (
            np.load(io.BytesIO(job.store.read(made.file(f"{name}.npy"))), allow_pickle=False)
            for name in ("products", "queries")
        )
        place_of = {text: place for place, text in enumerate(self._all_queries())}
        metrics = made.metrics
        return Pair(
            lambda texts: query_QD[[place_of[text] for text in texts]], product_ND, metrics["seconds_training"],
            metrics["seconds_indexing"], lambda: metrics["milliseconds_a_query"],
        )  # fmt: skip

    def _all_queries(self) -> list[str]:
        return sorted({text for judged in self.bench.judged.values() for text in judged.queries})

    def _fine_tuned(self, job: Job, attempt: Attempt, seed: int) -> Manifest:
        recipe = job.recipe
        if recipe.embedding.encoder == "lsa" or self.parts["catalog"].metrics["width"]:
            raise InputError(
                "DPR fine-tunes a pretrained text encoder, and embedding.encoder "
                + (
                    "is lsa, which has no weights to tune"
                    if recipe.embedding.encoder == "lsa"
                    else "did not make the given vectors"
                )
            )
        budget, texts = recipe.reproduce, join_text(self.bench.products, recipe.embedding.text)
        taught = training_pairs(self.bench.pairs, recipe.generator.min_relevance, recipe.generator.relevance_weights)
        pairs = [
            (query, self.bench.row_of[product])
            for query, product in zip(taught["query"].to_pylist(), taught["product_id"].to_pylist())
            if product in self.bench.row_of
        ]
        index, _, _ = self._index("plain")
        found = tuning.pairs_with_negatives(
            pairs, texts, lambda query: ranking.top(index.scores(query)[None], tuning.NEGATIVES_FROM, above=0.0)[0].tolist(),
            seed=seed, most=budget.dpr_pairs,
        )  # fmt: skip
        encoder = HuggingFaceEncoder(
            recipe.embedding.encoder, batch=recipe.embedding.batch, tokens=recipe.embedding.tokens
        )
        start = time.monotonic()
        with progress.bar(
            "fine-tuning DPR", -(-len(found) // budget.dpr_batch) * budget.dpr_epochs, unit="steps"
        ) as bar:
            history = tuning.fine_tune(
                encoder, found, epochs=budget.dpr_epochs, batch=budget.dpr_batch, learning_rate=budget.dpr_learning_rate,
                seed=seed, say=lambda step, steps, loss: bar.advance(1),
            )  # fmt: skip
        trained = time.monotonic()
        blocks = []
        with progress.bar("embedding products with DPR", len(texts), unit="products") as bar:
            for begin in range(0, len(texts), 1024):
                blocks.append(encoder.encode(texts[begin : begin + 1024]))
                bar.advance(len(blocks[-1]))
        indexed = time.monotonic()
        queries = self._all_queries()
        arrays = {"products": np.concatenate(blocks), "queries": encoder.encode(queries)}
        a_query = 1000 * (time.monotonic() - indexed) / max(1, len(queries))
        files = [job.store.write_file(attempt.name(f"{name}.npy"), _npy(array)) for name, array in arrays.items()]
        return attempt.commit(
            files, metrics={"loss": [epoch["loss"] for epoch in history], "pairs": len(found), "seconds_training": trained - start,
                            "seconds_indexing": indexed - trained, "milliseconds_a_query": a_query},
        )  # fmt: skip

    # IDs

    def _ids_ranking(self, condition: Condition, seed: int, parents: dict[str, Manifest]) -> Ranking:
        """The proxy generator of these IDs, trained on the teaching pairs and titles, searched by a beam of RETURNED."""
        job, parts = self.embedded(self.recipe_of(condition, seed))
        ids, vectors = parents["ids"], self.bench.vectors(job, parts)
        codes_NL, docids = self.codes(ids)
        codes_per_level = ids.metrics["codes_per_level"]
        product_ND, start = vectors.adapted(), time.monotonic()
        # Trainings multiply in bfloat16 where the processor can; the search is in float32.
        torch.set_float32_matmul_precision("medium")
        try:
            model = proxy.train(product_ND, codes_NL, codes_per_level, vectors.questions(), seed=seed)
        finally:
            torch.set_float32_matmul_precision("highest")
        trained = time.monotonic()
        trie = Trie.build(codes_NL, codes_per_level=codes_per_level, shared=True)
        indexed = time.monotonic()
        making = parents["quantizer"].metrics["seconds"] + ids.metrics["seconds"]
        weights = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
        cost = cost_of(making + trained - start, indexed - trained, 0.0, trie.nbytes + weights)
        cost |= {"ids_seconds": round(making, 2), "generator_seconds": round(trained - start, 2)}
        if condition.settings.get("clusters"):
            return self._clustered(vectors, model, trie, cost)
        query_QD = vectors.adapted_queries(self._texts)
        rows_QC, found = np.full((len(query_QD), RETURNED), -1, np.int64), []
        searching, order_N = time.monotonic(), trie.order_N
        for query, ranges_K2 in enumerate(proxy.searched(model, trie, query_QD, width=RETURNED)):
            ranges_K2 = ranges_K2[ranges_K2[:, 0] < ranges_K2[:, 1]]
            rows = np.concatenate([np.sort(order_N[a:b]) for a, b in ranges_K2] or [np.empty(0, np.int64)])[:RETURNED]
            rows_QC[query, : len(rows)] = rows
            found.append([docids[order_N[first]] for first, _ in ranges_K2])
        milliseconds = vectors.milliseconds + 1000 * (time.monotonic() - searching) / max(1, len(query_QD))
        return Ranking(rows_QC, cost | {"ms_per_query": round(milliseconds, 3)}, {}, found)

    def _clustered(self, vectors: Vectors, model: proxy.ProxyGenerator, trie: Trie, cost: dict) -> Ranking:
        """GDR (2401.10487): the products of the clusters that the generator finds, ordered by cosine + a · log P(cluster); how
        many clusters and a are chosen on validation."""
        product_ND, order_N = ranking.unit(vectors.adapted()), trie.order_N
        validation = self.bench.asked("validation")
        asked_QD, most = vectors.adapted_queries(validation.texts), max(ranking.CLUSTERS_GRID)
        clusters = proxy.found(model, trie, asked_QD, width=most, levels=1)
        scored = ranking.clusters_scored(clusters, ranking.unit(asked_QD), product_ND, order_N)
        chosen = ranking.tune_clusters(scored, validation.relevant)
        query_QD = vectors.adapted_queries(self._texts)
        start = time.monotonic()
        clusters = proxy.found(model, trie, query_QD, width=chosen["clusters"], levels=1)
        scored = ranking.clusters_scored(clusters, ranking.unit(query_QD), product_ND, order_N)
        rows_QC = np.stack([ranking.best_of(one, chosen["clusters"], chosen["weight"]) for one in scored])
        milliseconds = vectors.milliseconds + 1000 * (time.monotonic() - start) / max(1, len(query_QD))
        read = cost["bytes"] + product_ND.nbytes
        return Ranking(rows_QC, cost | {"ms_per_query": round(milliseconds, 3), "bytes": int(read)}, chosen)

    def codes(self, ids: Manifest) -> tuple[np.ndarray, list[str]]:
        """Codes N×L and IDs in the order of the bench's products."""
        rows = [
            self.job.store.read_table(ids.file(part["name"]), columns=["product_id", "codes"]) for part in ids.parts()
        ]
        codes = {}
        space = DocidSpace(tuple(ids.metrics["codes_per_level"]))
        for table in rows:
            codes |= zip(table["product_id"].to_pylist(), matrix(table["codes"]).astype(np.int64))
        if codes.keys() != self.bench.row_of.keys():
            raise InputError(
                f"IDs {ids.key} are not those of this catalogue's products ({len(codes)}); rerun jobs.assign_ids"
            )
        codes_NL = np.stack([codes[product] for product in self.bench.product_ids])
        return codes_NL, [space.text(code_L) for code_L in codes_NL]

    # Generators trained in full: of a kind of IDs, and of the release

    def _generator_ranking(self, condition: Condition, seed: int, parents: dict[str, Manifest]) -> Ranking:
        """The recipe's own generator, trained on these IDs as `reindex` would, and its beam of RETURNED whole IDs."""
        settings = releases.retriever_settings(parents, release=condition.name, beam_width=RETURNED)
        rows_QC, milliseconds, found = self._searched(parents, settings)
        ids, trained = (
            sum(parents[name].metrics["seconds"] for name in names)
            for names in (("quantizer", "ids"), ("examples", "generator"))
        )
        cost = cost_of(ids + trained, 0.0, milliseconds, 0) | {"ids_seconds": ids, "generator_seconds": trained}
        # Of IDs that products share the list ends with the products that were asked for, so it is no list of a beam's IDs.
        return Ranking(rows_QC, cost, {}, None if parents["ids"].metrics["ids"] == "cluster" else found)

    def _searched(self, parts: dict[str, Manifest], settings: dict) -> tuple[np.ndarray, float, list[list[str]]]:
        """Rows Q×RETURNED, milliseconds a query, and the IDs found, by a retriever over these parts."""
        retriever = open_retriever(releases.parts_folder(self.job.store, parts, releases.default_cache(), settings))
        hits, start = [], time.monotonic()
        for begin in range(0, len(self._texts), 64):
            texts = [text[: retriever.max_query_chars] for text in self._texts[begin : begin + 64]]
            hits += retriever.retrieve(texts, k=min(RETURNED, retriever.beam_width))
        milliseconds = 1000 * (time.monotonic() - start) / max(1, len(self._texts))
        rows_QC = np.full((len(hits), RETURNED), -1, np.int64)
        for query, row in enumerate(hits):
            rows_QC[query, : len(row)] = [self.bench.row_of[hit.product_id] for hit in row]
        return rows_QC, milliseconds, [list(dict.fromkeys(hit.docid_text for hit in row)) for row in hits]

    def _released(self, condition: Condition, seed: int) -> dict[str, Manifest]:
        """The parts of the release that is current, where it was made of this catalogue and these pairs; of another seed than the
        recipe's those that its release would have, over the same embeddings and adapter."""
        if seed != self.job.recipe.seed:
            return self._made_as_released(condition, seed)
        try:
            release = releases.current(self.job.store)
        except ReleaseError:
            raise InputError(
                "the store holds no release, and this needs a generator trained in full: run `catid2 reindex` with "
                "this recipe first"
            ) from None
        parts = release.manifests(self.job.store)
        for name in ("catalog", "pairs"):
            if parts[name].digest != self.parts[name].digest:
                raise InputError(
                    f"release {release.name} was made of another {name} than this recipe's: run `catid2 reindex` anew"
                )
        return parts

    def _made_as_released(self, condition: Condition, seed: int) -> dict[str, Manifest]:
        recipe = self.job.recipe
        if condition.name not in recipe.reproduce.methods:
            raise InputError(
                f"a further seed of {condition.name} trains a generator in full: name it in reproduce.methods"
            )
        job = dataclasses.replace(self.job, recipe=Recipe.build(recipe.model_dump(mode="json") | {"seed": seed}))
        parts = parts_of_kind(job, self.parts)
        names = list(RUN)
        for name in names[names.index("ids") + 1 : names.index("evaluation")]:
            if (made := RUN[name](job, parts)) is not None:
                parts[STAGES[name].role] = made
        return parts

    def _ahead(self, parts: dict[str, Manifest]) -> dict:
        """Weights and encoder of a look-ahead by vectors alone."""
        if (ahead := ahead_of(self.job.recipe, parts)) is None:
            raise InputError("the release has no node vectors to look ahead by: serve it with serving.expansion")
        ahead["lookahead"]["lexical_weight"] = 0.0
        return ahead

    def _release_ranking(self, condition: Condition, seed: int, parents) -> Ranking:
        parts = self._released(condition, seed)
        of_job = seed == self.job.recipe.seed
        release = releases.current(self.job.store).name if of_job else f"none; made with seed {seed}"
        alone, ahead = None if condition.settings["served"] else RETURNED, None
        if condition.settings.get("ahead"):
            ahead = self._ahead(parts)
        settings = releases.retriever_settings(parts, release=release, beam_width=alone, ahead=ahead)
        rows_QC, milliseconds, _ = self._searched(parts, settings)
        training = sum(
            parts[name].metrics["seconds"]
            for name in ("adapter", "quantizer", "ids", "generator", "mixture")
            if name in parts
        )
        indexing = sum(
            parts[name].metrics["seconds"] for name in ("embeddings", "node_vectors", "serving") if name in parts
        )
        kind = Recipe.stored(parts["ids"].recipe).quantizer.kind
        return Ranking(rows_QC, cost_of(training, indexing, milliseconds, 0), {"kind": kind, "release": release})


def _digest(texts: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()


def _why_no_adapter(job: Job, parts: dict[str, Manifest]) -> str:
    if "adapter" in parts:
        return "the one that was learned finds no more on the queries kept back, and was not adopted"
    return adapter.reason_against(job.recipe, parts) or "none was made"


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array.astype(np.float32), allow_pickle=False)
    return buffer.getvalue()
