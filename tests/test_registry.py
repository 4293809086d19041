"""The registry itself, and every line of every table in the package."""

import importlib
import pkgutil
import sys

import pytest

import sana
from sana.registry import Registry, UnknownNameError, suggest


def find_registries() -> dict[str, Registry]:
    """Returns every module-level Registry of the package, by "module.NAME"."""
    found: dict[str, Registry] = {}
    for info in pkgutil.walk_packages(sana.__path__, "sana."):
        module = importlib.import_module(info.name)
        for name, value in list(vars(module).items()):
            if isinstance(value, Registry) and value not in found.values():
                found[f"{info.name}.{name}"] = value
    return found


def test_every_line_of_every_table_resolves() -> None:
    registries = find_registries()
    assert {"sana.models.TRANSFORMERS", "sana.models.AUTOENCODERS", "sana.models.TEXT_ENCODERS"} <= set(registries)
    for table, registry in registries.items():
        for name in registry:
            assert registry[name] is not None, f"{table}[{name!r}]"


def test_official_names_are_registered() -> None:
    from sana.diffusion import SAMPLERS
    from sana.models import TRANSFORMERS

    official = [f"SanaMS_600M_P{patch}_D28" for patch in (1, 2, 4)]
    official += ["SanaMS_1600M_P1_D20", "SanaMS_1600M_P2_D20", "SanaMS_2400M_P1_D30", "SanaMS_3200M_P1_D40"]
    official += ["SanaMS_4800M_P1_D60", "SanaMSCM_600M_P1_D28", "SanaMSCM_1600M_P1_D20", "SanaMSCM_2400M_P1_D30"]
    official += ["Sana_600M_P1_D28", "Sana_1600M_P1_D20", "SanaMS1.5_1600M_P1_D20", "SanaMS1.5_4800M_P1_D60"]
    official += ["SanaMSControlNet_600M_P1_D28", "SanaMSControlNet_1600M_P1_D20"]
    assert set(official) <= set(TRANSFORMERS)
    assert {"flow_dpm-solver", "flow_euler", "dpm-solver", "sa-solver", "scm"} <= set(SAMPLERS)


def test_a_name_is_imported_on_first_use_only() -> None:
    sys.modules.pop("this_module_is_not_there", None)
    registry = Registry("thing", {"a": "this_module_is_not_there:x", "b": "collections:OrderedDict"})
    assert "a" in registry
    assert list(registry) == ["a", "b"]
    assert len(registry) == 2
    assert registry["b"] is __import__("collections").OrderedDict
    with pytest.raises(ModuleNotFoundError):
        registry["a"]


def test_an_unknown_name_lists_the_known_and_suggests() -> None:
    registry = Registry("sampler", {"flow_euler": "a:b", "scm": "a:c"})
    message = r"Unknown sampler 'flow_eular'. Did you mean 'flow_euler'\? Known names: flow_euler, scm\."
    with pytest.raises(UnknownNameError, match=message):
        registry["flow_eular"]
    assert isinstance(UnknownNameError("x"), ValueError)
    assert registry.get("zzz") is None
    assert "zzz" not in registry


@pytest.mark.parametrize("target", ["module", "module:", ":attribute", ""])
def test_a_malformed_target_is_refused_at_once(target: str) -> None:
    with pytest.raises(ValueError, match="module:attribute"):
        Registry("thing", {"a": target})


def test_suggest_ignores_case() -> None:
    assert suggest("SANAMS_600m_p1_d28", ["SanaMS_600M_P1_D28", "scm"]) == " Did you mean 'SanaMS_600M_P1_D28'?"
    assert suggest("qqq", ["abc"]) == ""
