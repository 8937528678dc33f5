"""ArithmeticData: + - * / of whole numbers, with the steps written out or not."""

import re
from collections.abc import Iterator

from lm.bounds import checked
from lm.data.tasks import TaskData
from lm.errors import UserError

OPERATORS = "+-*/"
STEPS = {"*": "+", "/": ","}
"""What is between the steps of an operator."""
TYPED = str.maketrans("−×·÷", "-**/")
"""Signs that people write, and the operators that they mean."""


class ArithmeticData(TaskData):
    """Sums, differences, products, and quotients with remainder, of numbers below 10^digits: 17/5=3r2.

    Lee et al., "Teaching Arithmetic to Small Transformers" (2023): results with their digits reversed are learned
    sooner, as each digit then depends only on what has been written. Steps are what they call a scratchpad: a product
    is the sum of one digit's after another, 12*34=48+360=408, and a quotient is found digit by digit from the left,
    each with the remainder that goes on to the next, 97/4=2r1,4r1=24r1.

    Args:
        digits: Most digits of an operand.
        operators: Some of + - * /.
        reverse: Whether the digits of each number in the result are written from the last to the first.
        pad: Whether operands have leading zeros, so that digits of equal place value have equal positions; numbers of
            steps always have them.
        written_steps: Whether the answer to * and / begins with its steps.
        block_size: Tokens in a sequence.
        batch_size: Problems per optimizer step, over all processes and accumulated micro-batches.
        held_out: Problems for validation, and as many others for testing.
        train_problems: How many of the others training draws from, the same ones for every seed; None for all.
        num_workers: Processes that prepare batches.
        seed: Chooses the training problems; set from seed_everything.
    """

    @checked("data.", UserError)
    def __init__(
        self,
        *,
        digits: int = 3,
        operators: str = "+",
        reverse: bool = True,
        pad: bool = False,
        written_steps: bool = False,
        block_size: int = 16,
        batch_size: int = 256,
        held_out: int = 10_000,
        train_problems: int | None = None,
        num_workers: int = 0,
        seed: int = 1337,
    ) -> None:
        super().__init__(
            block_size=block_size,
            batch_size=batch_size,
            held_out=held_out,
            train_problems=train_problems,
            num_workers=num_workers,
            seed=seed,
        )
        unknown = [operator for operator in operators if operator not in OPERATORS]
        if unknown or not operators or len(set(operators)) < len(operators):
            found = f"unknown operator {unknown[0]!r}" if unknown else f"{operators!r} is empty or says one twice"
            raise UserError(f"data.operators: {found}: say some of {OPERATORS}, each once")
        self.digits, self.operators = digits, operators
        self.reverse, self.pad, self.written_steps = reverse, pad, written_steps

    @property
    def symbols(self) -> str:
        """Digits, operators and signs."""
        signs = {"-": "-", "/": "r"} if not self.written_steps else {"-": "-", "*": "+", "/": "r,"}
        return "0123456789=" + self.operators + "".join(signs.get(operator, "") for operator in self.operators)

    @property
    def size(self) -> int:
        """The number of pairs of operands, for each operator; nothing is divided by zero."""
        numbers: int = 10**self.digits
        return len(self.operators) * numbers**2 - ("/" in self.operators) * numbers

    def example(self, index: int) -> tuple[str, str]:
        """Return problem and answer number index; divisions come last."""
        others, numbers = self.operators.replace("/", ""), 10**self.digits
        if (division := index - len(others) * numbers**2) >= 0:
            a, b = divmod(division, numbers - 1)
            return self._problem(a, "/", b + 1)
        index, place = divmod(index, len(others))
        a, b = divmod(index, numbers)
        return self._problem(a, others[place], b)

    def _problem(self, a: int, operator: str, b: int) -> tuple[str, str]:
        if operator == "/":
            answer = "r".join(map(self._written, divmod(a, b)))
        else:
            answer = self._written({"+": a + b, "-": a - b, "*": a * b}[operator])
        width = self.digits if self.pad else 1
        left, right = f"{a:0{width}}", f"{b:0{width}}"
        if self.written_steps and operator in STEPS:
            steps = self._products(a, right) if operator == "*" else self._divisions(left, b)
            answer = f"{STEPS[operator].join(steps)}={answer}"
        return f"{left}{operator}{right}=", answer

    def _products(self, a: int, digits: str) -> Iterator[str]:
        """Yield the product by each digit, the last first."""
        for place, digit in enumerate(reversed(digits)):
            yield self._written(a * int(digit) * 10**place, self.digits + 1 + place)

    def _divisions(self, digits: str, b: int) -> Iterator[str]:
        """Yield the digit of the quotient, and the remainder, after each digit, the first first."""
        rest = 0
        for digit in digits:
            quotient, rest = divmod(10 * rest + int(digit), b)
            yield f"{quotient}r{self._written(rest, self.digits)}"

    def _written(self, number: int, width: int = 1) -> str:
        text = f"{abs(number):0{width}}"
        return "-" * (number < 0) + (text[::-1] if self.reverse else text)

    def question(self, prompt: str) -> tuple[str, str]:
        """Return a problem without and with the leading zeros used in training, 12+34= and 012+034=."""
        form = rf"\s*([0-9]+)\s*([{re.escape(self.operators)}])\s*([0-9]+)\s*=?\s*"
        found = re.fullmatch(form, prompt.translate(TYPED))
        numbers = [found[k].lstrip("0") or "0" for k in (1, 3)] if found else []
        if found is None or max(map(len, numbers)) > self.digits:
            raise UserError(
                f"{prompt[:40]!r} is no problem of this network: it takes two numbers of up to {self.digits} digits "
                f"with {' or '.join(self.operators)} between them, {self._problem(2, self.operators[0], 1)[0]} say"
            )
        a, b, operator = *map(int, numbers), found[2]
        if operator == "/" and b == 0:
            raise UserError(f"{prompt[:40]!r}: nothing is divided by zero: say another number")
        return f"{a}{operator}{b}=", self._problem(a, operator, b)[0]

    def kind(self, problem: str) -> str:
        """Return its operator, and the digits of the longer operand."""
        left, operator, right = re.split(r"(\D)", problem.rstrip("="), maxsplit=1)
        digits = max(len(str(int(one))) for one in (left, right))
        return f"{operator} of {digits} digit{'s' * (digits > 1)}"

    def result(self, answer: str) -> str:
        """Return what follows the last =."""
        return answer.rpartition("=")[2]

    def readable(self, answer: str) -> str:
        """Return the result, its digits in the usual order: 24 remainder 1."""
        return self._usual(self.result(answer)).removesuffix("r0").replace("r", " remainder ")

    def readable_steps(self, answer: str) -> str:
        """Return the answer, the digits of its numbers in the usual order."""
        return self._usual(answer)

    def _usual(self, text: str) -> str:
        def number(found: re.Match[str]) -> str:
            return str(int(found[0][::-1] if self.reverse else found[0]))

        return re.sub("[0-9]+", number, text)

    def longest(self) -> tuple[str, str]:
        """Return the problem of the longest answer."""
        top = 10**self.digits - 1
        pairs = {"+": (top, top), "-": (top // 10 + 1, top), "*": (top, top), "/": (top, top // 2 + 1)}
        return max(
            (self._problem(pairs[op][0], op, pairs[op][1]) for op in self.operators), key=lambda e: len("".join(e))
        )
