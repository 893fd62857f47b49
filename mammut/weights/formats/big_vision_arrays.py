"""The arrays of a big_vision file, by their current names."""

from collections.abc import Callable, Mapping

from mammut.weights.files.tensor_file import CheckpointError, TensorSpec
from mammut.weights.tables import Shape

# Flax before Linen counted all modules of a block together, not each class separately.
_OLD_BLOCK = {
    "MultiHeadDotProductAttention_1": "MultiHeadDotProductAttention_0",
    "LayerNorm_2": "LayerNorm_1",
    "MlpBlock_3": "MlpBlock_0",
}
_OLD_POSITIONS = "Transformer/posembed_input/pos_embedding", "Transformer/pos_embedding"
# The arrays of the MAP head in old files, in which it was not yet a module of its own.
_MAP_HEAD = "probe", "MultiHeadDotProductAttention_0", "LayerNorm_0", "MlpBlock_0"


class Arrays:
    """The arrays of a file, by big_vision's current names.

    Problems are gathered and raised together.

    Args:
      where: the file, for errors.
      specs: its arrays.
      part: the beginning of the model's names, behind the `params/` of a train state.

    Attributes:
      outside: the arrays that are not parameters of the model, each with the reason.
    """

    def __init__(self, where: str, specs: Mapping[str, TensorSpec], part: str):
        self._where = where
        self._specs = specs
        self._problems: list[str] = []

        params = ""
        for top in ("params/", "opt/target/"):
            if any(key.startswith(top) for key in specs):
                params = top
                break
        self._top = params + part
        self.outside = {}
        for key in specs:
            if not key.startswith(params):
                self.outside[key] = "of the training, not of the model"
            elif not key.startswith(self._top):
                self.outside[key] = f"not of {part}"
        names = [key.removeprefix(self._top) for key in specs if key not in self.outside]
        self._keys: dict[str, str] = {}
        for old in names:
            name = _current_name(old, "probe" in names)
            self.require(
                name not in self._keys,
                f"{self._top}{old} and {self.key(name)} are names of the same array",
            )
            self._keys[name] = self._top + old

    def __contains__(self, name: str) -> bool:
        return name in self._keys

    def under(self, prefix: str) -> list[str]:
        """Lists the names that begin with `prefix`."""
        return [name for name in self._keys if name.startswith(prefix)]

    def key(self, name: str) -> str:
        """Finds the name of an array in the file.

        Where the array is missing, this is the name that it would have.
        """
        return self._keys.get(name, self._top + name)

    def shape(self, name: str, axes: int) -> Shape:
        """Reads the shape of an array with `axes` axes.

        Where there is no such array, a problem is noted and the shape is made of ones.
        """
        if name not in self:
            self._problems.append(f"{self.key(name)} is missing")
            return (1,) * axes
        shape = tuple(self._specs[self._keys[name]].shape)
        if len(shape) == axes and min(shape) > 0:
            return shape
        self._problems.append(
            f"{self.key(name)} is {list(shape)}, expected {axes} axes, none of them empty"
        )
        return (1,) * axes

    def require(self, condition: bool, problem: str) -> None:
        """Notes a problem unless the condition holds."""
        if not condition:
            self._problems.append(problem)

    def build(self, make: Callable, *args, **kwargs):
        """Makes a config by `make(*args, **kwargs)`.

        Raises:
          CheckpointError: a problem was noted, or the arrays do not make a valid config.
        """
        problems = list(dict.fromkeys(self._problems))
        if not problems:
            try:
                return make(*args, **kwargs)
            except ValueError as error:
                problems = [str(error)]
        raise CheckpointError(
            f"{self._where} is no model of big_vision that mammut can be: {'; '.join(problems)}"
        )


def _current_name(name: str, inlined_head: bool) -> str:
    """Renames an array as `fix_old_checkpoints` of models/vit.py does."""
    if name in _OLD_POSITIONS:
        return "pos_embedding"
    if inlined_head and name.partition("/")[0] in _MAP_HEAD:
        return f"MAPHead_0/{name}"
    parts = name.split("/")
    pairs = zip(["", *parts[:-1]], parts)
    return "/".join(
        _OLD_BLOCK.get(part, part) if above.startswith("encoderblock") else part
        for above, part in pairs
    )
