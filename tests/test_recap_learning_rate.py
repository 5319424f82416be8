"""The rate rises along the warm-up, then stays or falls, in either training."""

from hypothesis import given
from hypothesis import strategies as st

from recap.config.finetune import Finetune
from recap.learning_rate import learning_rate
from train_t2i.config import Train


@given(st.sampled_from([Finetune, Train]), st.integers(1, 300), st.integers(0, 400),
       st.sampled_from(["constant", "cosine"]))
def test_the_rate_rises_to_its_height_and_stays_or_falls_to_zero(table: type[Finetune | Train], steps: int,
                                                                 warmup_steps: int, scheduler: str) -> None:
    config = table.model_validate({"steps": steps, "warmup_steps": warmup_steps, "lr_scheduler": scheduler, "lr": 1})
    rates = [learning_rate(config, step) for step in range(steps)]
    risen, after = rates[:warmup_steps], rates[warmup_steps:]
    assert all(0 < rate <= 1 for rate in rates) and risen == sorted(risen)
    assert after == sorted(after, reverse=True) and after[:1] in ([], [1])
    if scheduler == "constant":
        assert set(after) <= {1}
    elif len(after) > 20:
        assert after[-1] < 0.01
