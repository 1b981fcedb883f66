"""Whatever is added, removed, relabelled or selected, numbers differ by whole groups of patients."""

from __future__ import annotations

from itertools import combinations

from hypothesis import given
from hypothesis import strategies as st

from client.site.release_groups import ReleaseGroup, ScanCell, form_groups, select_complete

CELLS = st.sampled_from(["train/0", "train/1", "test/0"])


@st.composite
def tables(draw: st.DrawFn) -> list[dict[str, ScanCell]]:
    """Draw a table of scans as it is at several times: scans come, go, and change their class."""
    num_scans = draw(st.integers(1, 40))
    patient_of_scan = [f"p{draw(st.integers(0, num_scans)):02}" for _ in range(num_scans)]
    versions = []
    for _ in range(draw(st.integers(1, 4))):
        table = {}
        for scan, patient in enumerate(patient_of_scan):
            if draw(st.integers(0, 9)) > 0:
                table[f"s{scan:02}"] = ScanCell(patient, draw(CELLS))
        versions.append(table)
    return versions


def release(
    groups: list[ReleaseGroup], table: dict[str, ScanCell], min_patients: int
) -> dict[str, frozenset[str]]:
    """Return {cell: its released scans}, and add the groups that were formed."""
    groups += form_groups(groups, table, min_patients)
    selected = select_complete(groups, table)
    released: dict[str, set[str]] = {}
    for scan in selected:
        released.setdefault(table[scan].cell, set()).add(scan)
    return {cell: frozenset(scans) for cell, scans in released.items()}


@given(tables(), st.integers(2, 5))
def test_no_combination_of_released_sets_is_about_few_patients(
    versions: list[dict[str, ScanCell]], min_patients: int
) -> None:
    patients = {scan: cell.patient for table in versions for scan, cell in table.items()}
    groups: list[ReleaseGroup] = []
    released_sets = set()
    for table in versions:
        released_sets |= set(release(groups, table, min_patients).values())
    atoms: dict[tuple[bool, ...], set[str]] = {}
    for scan, patient in patients.items():
        signature = tuple(scan in scans for scans in sorted(released_sets, key=sorted))
        if any(signature):
            atoms.setdefault(signature, set()).add(patient)
    # Every sum, difference and intersection of the sets is a union of these atoms.
    assert all(len(atom) >= min_patients for atom in atoms.values())


@given(tables(), st.integers(2, 5))
def test_counts_of_patients_with_one_scan_are_multiples_of_the_minimum(
    versions: list[dict[str, ScanCell]], min_patients: int
) -> None:
    groups: list[ReleaseGroup] = []
    for table in versions:
        single_scans = {scan: ScanCell(scan, cell.cell) for scan, cell in table.items()}
        for scans in release(groups, single_scans, min_patients).values():
            assert len(scans) % min_patients == 0


def make_table(num_patients: int, cell: str = "train/1") -> dict[str, ScanCell]:
    return {f"s{number:02}": ScanCell(f"p{number:02}", cell) for number in range(num_patients)}


def test_as_few_patients_as_possible_wait() -> None:
    groups: list[ReleaseGroup] = []
    sizes = []
    for num_patients in (4, 5, 9, 10, 12):
        sizes.append(sum(len(scans) for scans in release(groups, make_table(num_patients), 5).values()))
    assert sizes == [0, 5, 5, 10, 10]


def test_one_patient_with_five_scans_is_one_patient() -> None:
    scans = {f"s{number}": ScanCell("p", "train/1") for number in range(5)}
    assert not form_groups([], scans, 5)
    together = scans | {f"t{number}": ScanCell(f"q{number}", "train/1") for number in range(4)}
    (group,) = form_groups([], together, 5)
    assert len(group.list_scans()) == 9


def test_removed_patient_takes_its_group_along_and_nobody_joins_another() -> None:
    groups: list[ReleaseGroup] = []
    before = release(groups, make_table(15), 5)["train/1"]
    smaller = {scan: cell for scan, cell in make_table(15).items() if scan != "s07"}
    after = release(groups, smaller, 5)["train/1"]
    assert after < before
    assert len(before - after) == 5
    assert release(groups, make_table(15), 5)["train/1"] == before
    members = [set(group.list_scans()) for group in groups]
    assert not any(first & second for first, second in combinations(members, 2))
