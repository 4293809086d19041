"""Names that the converters take, apart from what imports torch: a command's help needs them. Configs are not here."""

MODEL_TYPES = (
    "SanaMS_600M_P1_D28",
    "SanaMS_1600M_P1_D20",
    "SanaMS1.5_1600M_P1_D20",
    "SanaMS1.5_3200M_P1_D40",
    "SanaMS1.5_4800M_P1_D60",
    "SanaSprint_600M_P1_D28",
    "SanaSprint_1600M_P1_D20",
)
SCHEDULERS = ("flow-dpm_solver", "flow-euler", "scm")
