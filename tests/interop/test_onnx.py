"""ONNX Runtime computes what a denoiser computes, and the page about sharing shows how."""

import pytest
import torch
from sharing_page import BLOCKS, DENOISERS, denoiser_and_inputs, export_as_shown

pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")
pytestmark = pytest.mark.usefixtures("unchecked")


def test_the_python_of_the_page_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    export_as_shown()
    names: dict[str, object] = {}
    for code in BLOCKS:
        exec(compile(code, "sharing.md", "exec"), names)


@pytest.mark.parametrize("kind", DENOISERS)
def test_onnxruntime_computes_what_the_denoiser_computes_for_any_batch_size(kind, tmp_path):
    denoiser, example, inputs = denoiser_and_inputs(kind)
    batch, names = torch.export.Dim("batch"), ["x_t", "t", "label"][: len(example)]
    file = str(tmp_path / "denoiser.onnx")
    shapes = tuple({0: batch} for _ in example)
    torch.onnx.export(denoiser, example, file, dynamo=True, dynamic_shapes=shapes, input_names=names, verbose=False)
    session = onnxruntime.InferenceSession(file)
    (found,) = session.run(None, {name: value.numpy() for name, value in zip(names, inputs, strict=True)})
    wanted = denoiser(*inputs)
    torch.testing.assert_close(torch.from_numpy(found), wanted, rtol=1e-4, atol=1e-4 * float(wanted.std()))
    assert not torch.allclose(wanted, denoiser(inputs[0], inputs[1] / 2, *inputs[2:]), rtol=1e-2)
