"""Prove in a test of your own that your own training script resumes exactly.

Write the script so that one function builds everything and trains below a directory that it is given:

    def train(root):
        seed_everything(1)
        trainer = Trainer(default_root_dir=root, max_epochs=2)
        trainer.fit(MyModule(), MyData(), ckpt_path="auto")

and hand that function to `assert_exact_resume`:

    from holdfast.testing import assert_exact_resume

    def test_my_training_resumes_exactly(tmp_path):
        assert_exact_resume(train, tmp_path)

It trains once to the end; then again below another directory, where it is stopped in several places and
started again each time; and compares the two, batch by batch and bit by bit. Where they part, the error names
what parted first: the rows of a batch, what was made of them, a generator, a logged value, a parameter.
"""

from holdfast.testing.exact_resume import ExactResume as ExactResume
from holdfast.testing.exact_resume import assert_exact_resume as assert_exact_resume

__all__ = ["ExactResume", "assert_exact_resume"]
