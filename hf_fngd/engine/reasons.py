"""Why a layer has its plain gradient, as far as the engine finds out; the coverage report gives these reasons."""

CALLED_AGAIN = "it is called more than once in a forward pass"
NEVER_CALLED = (
    "it was never called in a forward pass of the model in training mode: call the model itself (or other code reads "
    "its weight in its place, as TRL's trainers do)"
)
PASSED_BY = "some of its gradient came from no forward pass of the model in training mode: call the model itself"
OTHER_INPUT = "it was called with an input that has no batch dimension or is nested, or with further arguments"
NOT_ITS_ROWS = "its input has neither the batch's rows nor its tokens, for which ids tell the samples"
USED_ELSEWHERE = "its weight is used outside of its forward as well"
ON_TOP_OF_ANOTHER = "reentrant activation checkpointing ran several forward passes before a backward pass"
COUPLED = "a BatchNorm reads its output, where clipping does harm, and no layer behind the BatchNorms can clip for it"
CLIPPED_BEHIND = "a BatchNorm reads its output, where clipping does harm: a layer behind the BatchNorms clips for it"
NO_BATCH = (
    "no input of the model is a tensor, or a mapping, list, tuple or dataclass that holds one, so that nothing tells "
    "how many samples there are"
)
