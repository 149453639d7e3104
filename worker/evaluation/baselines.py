"""What a score is worth nothing without: the commonest label, and a linear model on the same training rows."""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Sequence

import numpy as np

from ...protocol.errors import ConfigError
from .statistics import Labels


def majority(train: Labels, n: int) -> Labels:
    """int64 [n]: the commonest label of ``train`` (of equals, the smallest)."""
    counts = Counter(train.tolist())
    return np.full(n, min(counts, key=lambda label: (-counts[label], label)), dtype=np.int64)


def tfidf(train_texts: Sequence[str], train: Labels, test_texts: Sequence[str]) -> Labels:
    """int64 [n]: TF-IDF of words and pairs of words, logistic regression, scikit-learn's defaults otherwise."""
    require()
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    if len(set(train.tolist())) < 2:
        return majority(train, len(test_texts))
    vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"(?u)\S+")
    features = vectorizer.fit_transform(train_texts)
    model = LogisticRegression(max_iter=1000, C=10.0).fit(features, train)
    return np.asarray(model.predict(vectorizer.transform(test_texts)), dtype=np.int64)


def require() -> None:
    """Raises ConfigError without scikit-learn: better before a model is loaded than behind its first task."""
    if importlib.util.find_spec("sklearn") is None:
        raise missing("scikit-learn")


def missing(package: str) -> ConfigError:
    return ConfigError(f"{package} is not installed", hint="In potluck's checkout: pip install -e '.[eval]'")
