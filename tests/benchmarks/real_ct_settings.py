"""The settings that real_ct.py compares on the three real sources."""

from __future__ import annotations

from common.config.schema import PreprocessConfig

# {centre: the manifest's source}
CENTRES = {"ucsd": "ucsd_covidct", "soares": "soares_saopaulo", "mosmed": "mosmed"}
# Pictures with little contrast; the others' own 0..255 is their window.
WINDOWS = {"mosmed": (75.0, 175.0)}
# With the crop, lungs are as large as at 128 px without it.
PREPROCESS = PreprocessConfig(num_slices=1, image_size=96, crop="body")
BASE = [
    "federation=folder",
    f"federation.centres=[{','.join(CENTRES)}]",
    "backbone=mobilenetv1_075",
    f"preprocess.num_slices={PREPROCESS.num_slices}",
    f"preprocess.image_size={PREPROCESS.image_size}",
    f"preprocess.crop={PREPROCESS.crop}",
    "stage.batch_size=32",
    "stage.local_steps_mode=equal",  # 27 steps a round at every centre, 81 pooled
    # With 118 and 139 validation scans an AUC's standard error is .05: selecting a round would select noise.
    "evaluation.checkpoint_selection=last",
    "stage.optimiser.lr=3e-4",
]
COVID = ["stage.tasks=[covid]"]  # without the source head
PERSONAL = ["recipe=multisource_personal", "stages.main.rounds=6"]
FP32 = ["aggregation.tau=1", "aggregation.compression=fp32"]
SETTINGS: dict[str, list[str]] = {
    "central": ["federation.mode=central", *COVID],
    "local": ["federation.mode=local", *COVID],
    "tau 0 (FedAvg)": ["aggregation=fedavg", *COVID],
    "tau 0.5": ["aggregation.tau=0.5", *COVID],
    "tau 1": ["aggregation.tau=1", *COVID],
    "tau 0 + source head": ["aggregation=fedavg"],
    "tau 0.5 + source head": ["aggregation.tau=0.5"],
    "tau 1 + source head": ["aggregation.tau=1"],
    "tau 1 + FedBN": ["aggregation.tau=1", "stage.local_layers=[batch_norm]", *COVID],
    "tau 1, fp32": [*FP32, *COVID],  # all above and below were run when updates travelled so
    "tau 1, fp32, NCHW": [*FP32, "stage.channels_last=false", *COVID],  # other rounding, nothing else
    "tau 1, int8": ["aggregation.tau=1", "aggregation.compression=int8", *COVID],
    "tau 1, int4": ["aggregation.tau=1", "aggregation.compression=int4", *COVID],
    "tau 1, own pace": ["aggregation.tau=1", "stage.local_steps_mode=proportional", *COVID],
    "personal 6 + 2": [*PERSONAL, "stages.own.rounds=2"],  # 8 rounds like all above
    # A centre takes over what the others taught, then trains as long as it would alone.
    "personal 6 + 8": [*PERSONAL, "stages.own.rounds=8"],
    "local, 14 rounds": ["federation.mode=local", "stage.rounds=14", *COVID],
    "central, 14 rounds": ["federation.mode=central", "stage.rounds=14", *COVID],
}
