from pathlib import Path
import numpy as np, pytest
from safetensors.numpy import load_file
from server.runs import begin, open_ledger
from tests.inprocess import InProcess, phantom_config, sites

def test_try(tmp_path: Path) -> None:
    ledger=open_ledger(tmp_path)
    ph=tmp_path/"ph"
    out={}
    for name, over in {"plain":["aggregation.codec=fp32"], "secret":["aggregation.codec=fp32","privacy=secagg"], "hidden": ["aggregation.codec=fp32","privacy=secagg","privacy.secagg.hide=all","evaluation.over=pooled"]}.items():
        r=begin(phantom_config(ph,*over),InProcess(sites()),tmp_path,ledger,name)
        out[name]=load_file(tmp_path/name/"model.safetensors")
        print(name, r["seconds"], r["left_out"], r["stages"][0]["rounds"][-1]["bytes_up"], r["notes"], r["test"]["covid"]["pooled"]["auc"])
    for n in ("secret","hidden"):
        print(n, max(float(np.abs(out[n][k].astype(float)-out["plain"][k]).max()) for k in out["plain"] if out["plain"][k].dtype.kind=="f"))
    print({k:v["centres"] for k,v in r["test"].items()}.keys())
    assert 0
