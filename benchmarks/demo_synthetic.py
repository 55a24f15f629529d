# ruff: noqa: E501 -- long templates and source tables
"""Seeded generators of worked mathematics, dialogues and structured data for the demo's corpus."""

import json
import math
import random
from collections.abc import Callable, Sequence
from fractions import Fraction


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


NAMES = _words(
    """
    Amina Anton Beatriz Bruno Chen Clara Daniel Dalia Elena Emre Fatima Felix Grace Hana Henrik Ines Ivan Jamal
    Julia Kofi Lara Leo Lucía Marek Maya Mina Noah Nora Olga Omar Paulo Petra Priya Quentin Rosa Samir Sofia Tara
    Theo Uma Viktor Wanda Yuki Yusuf Zoe
    """
)
SURNAMES = _words(
    """
    Adler Bauer Castro Dubois Eriksen Ferrari García Hansen Ito Jansen Kim Lopez Moreau Novak Okafor Petrov Quispe
    Rossi Sato Tanaka Ueda Vargas Weber Xu Yilmaz Zeman
    """
)
CITIES = _words(
    """
    Lisbon Oslo Nairobi Lima Kyoto Vienna Porto Accra Tallinn Bogotá Osaka Ghent Turin Cork Bergen Quito Izmir
    Gdańsk Lyon Leeds Graz Malmö Utrecht Basel Seville Riga
    """
)
GOODS = _words(
    """
    notebook lamp kettle bicycle umbrella backpack teapot chair mirror blanket radio camera basket clock hammer
    ladder desk scarf compass telescope guitar drum candle carpet
    """
)
FRUITS = _words(
    """
    apples pears plums oranges cherries figs lemons apricots peaches mangoes
    """
)
WORDS = _words(
    """
    amber basin cedar delta ember fjord grove harbor island jasper kestrel lagoon meadow nectar orchard prairie
    quartz river summit timber valley willow zephyr
    """
)


def _signed(value: int) -> str:
    """Returns ``+ n`` or ``- n`` for use inside a formula."""
    return f"+ {value}" if value >= 0 else f"- {-value}"


def _polynomial(coefficients: Sequence[int], variable: str = "x") -> str:
    """Writes a polynomial; coefficients run from the highest power down."""
    degree = len(coefficients) - 1
    terms = []
    for position, coefficient in enumerate(coefficients):
        if coefficient == 0:
            continue
        power = degree - position
        body = "" if power == 0 else variable if power == 1 else f"{variable}^{power}"
        size = abs(coefficient)
        number = str(size) if power == 0 or size != 1 else ""
        sign = "-" if coefficient < 0 else "+"
        terms.append(f"{sign} {number}{body}")
    text = " ".join(terms) or "0"
    return text[2:] if text.startswith("+ ") else text.replace("- ", "-", 1) if text.startswith("- ") else text


def _linear_equation(rng: random.Random) -> str:
    a, x, b = rng.randint(2, 19), rng.randint(-15, 25), rng.randint(-40, 60)
    return rng.choice(
        [
            f"Solve {a}x {_signed(b)} = {a * x + b} for x.\nMove the constant to the right-hand side: {a}x = "
            f"{a * x + b} "
            f"{_signed(-b)} = {a * x}. Divide both sides by {a}: x = {a * x}/{a} = {x}.",
            f"Find the number x with {a}x {_signed(b)} = {a * x + b}.\nSubtracting {b} on both sides gives {a}x = "
            f"{a * x}, "
            f"so x = {x}. Check: {a}·({x}) {_signed(b)} = {a * x} {_signed(b)} = {a * x + b}, as required.",
        ]
    )


def _quadratic(rng: random.Random) -> str:
    p, q = rng.randint(-12, 12), rng.randint(-12, 12)
    b, c = -(p + q), p * q
    discriminant = b * b - 4 * c
    opening = f"Solve the quadratic equation {_polynomial([1, b, c])} = 0.\n"
    if rng.random() < 0.5:
        roots = sorted({p, q})
        answer = f"x = {roots[0]}" if len(roots) == 1 else f"x = {roots[0]} or x = {roots[1]}"
        return (
            f"{opening}We look for two numbers with product {c} and sum {-b}: these are {p} and {q}. Hence the left "
            f"side "
            f"factors as (x {_signed(-p)})(x {_signed(-q)}), and a product is zero only if a factor is zero, so "
            f"{answer}."
        )
    return (
        f"{opening}With a = 1, b = {b} and c = {c} the discriminant is b^2 - 4ac = {b * b} {_signed(-4 * c)} = "
        f"{discriminant}, whose square root is {math.isqrt(discriminant)}. Therefore x = ({-b} ± "
        f"{math.isqrt(discriminant)})/2, which gives x = {max(p, q)} and x = {min(p, q)}."
    )


def _system(rng: random.Random) -> str:
    x, y = rng.randint(-9, 12), rng.randint(-9, 12)
    a, b, c, d = (rng.choice([-5, -4, -3, -2, 2, 3, 4, 5, 7]) for _ in range(4))
    if a * d == b * c:
        d += 1
        d = d or 3
    determinant = a * d - b * c
    if determinant == 0:
        return _linear_equation(rng)
    e, f = a * x + b * y, c * x + d * y
    return (
        f"Solve the system\n  {a}x {_signed(b)}y = {e}\n  {c}x {_signed(d)}y = {f}\nMultiply the first equation by "
        f"{d} and "
        f"the second by {b}, then subtract: ({a}·{d} - {b}·{c})x = {d * e} {_signed(-b * f)}, that is {determinant}x = "
        f"{d * e - b * f}. Hence x = {x}. Substituting into the first equation yields {b}y = {e} {_signed(-a * x)} = "
        f"{e - a * x}, so y = {y}."
    )


def _fractions(rng: random.Random) -> str:
    first = Fraction(rng.randint(1, 11), rng.randint(2, 12))
    second = Fraction(rng.randint(1, 11), rng.randint(2, 12))
    common = math.lcm(first.denominator, second.denominator)
    left, right = first * common, second * common
    if rng.random() < 0.5:
        return (
            f"Compute {first} + {second}.\nThe least common denominator of {first.denominator} and "
            f"{second.denominator} is "
            f"{common}. So {first} + {second} = {left}/{common} + {right}/{common} = {left + right}/{common}"
            + (f" = {first + second}." if first + second != Fraction(0) else ".")
        )
    product = first * second
    return (
        f"Multiply {first} by {second} and simplify.\nMultiply numerators and denominators: "
        f"{first.numerator * second.numerator}/{first.denominator * second.denominator}. The greatest common "
        f"divisor is "
        f"{math.gcd(first.numerator * second.numerator, first.denominator * second.denominator)}, so the product is "
        f"{product}."
    )


def _euclid(rng: random.Random) -> str:
    factor = rng.randint(2, 24)
    a, b = factor * rng.randint(11, 90), factor * rng.randint(5, 60)
    a, b = max(a, b), min(a, b)
    lines, u, v = [], a, b
    while v:
        lines.append(f"  {u} = {u // v}·{v} + {u % v}")
        u, v = v, u % v
    return (
        f"Use Euclid's algorithm to find the greatest common divisor of {a} and {b}.\n"
        + "\n".join(lines)
        + "\nThe last "
        f"remainder that is not zero is {u}, so gcd({a}, {b}) = {u} and lcm({a}, {b}) = {a * b // u}."
    )


def _percentage(rng: random.Random) -> str:
    name, good = rng.choice(NAMES), rng.choice(GOODS)
    price, percent = rng.randint(4, 60) * 10, rng.choice([5, 10, 15, 20, 25, 30, 40])
    saved = price * percent / 100
    return (
        f"{name} wants to buy a {good} that costs {price} euros. In the sale the price is reduced by {percent} "
        f"percent. How "
        f"much does {name} pay?\nThe reduction is {percent}/100 · {price} = {saved:g} euros. The new price is "
        f"{price} - "
        f"{saved:g} = {price - saved:g} euros."
    )


def _journey(rng: random.Random) -> str:
    start, end = rng.sample(CITIES, 2)
    speed, hours = rng.randint(8, 30) * 5, rng.randint(2, 9)
    return (
        f"A train leaves {start} at {rng.randint(5, 14)}:00 and travels at a steady {speed} km/h. The distance to "
        f"{end} is "
        f"{speed * hours} km. How long does the journey take?\nTime is distance divided by speed: {speed * hours} / "
        f"{speed} = "
        f"{hours} hours. If the train went {rng.choice([10, 20, 25])} percent faster, the journey would be shorter, "
        f"but not "
        f"by the same percentage, since time is inversely proportional to speed."
    )


def _arithmetic_series(rng: random.Random) -> str:
    first, step, n = rng.randint(-6, 20), rng.randint(2, 13), rng.randint(8, 60)
    last = first + (n - 1) * step
    total = n * (first + last) // 2
    return (
        f"An arithmetic sequence starts {first}, {first + step}, {first + 2 * step}, … Find the sum of its first "
        f"{n} terms.\n"
        f"The common difference is {step}, so the term number {n} is {first} + {n - 1}·{step} = {last}. The sum is "
        f"n/2 · (first + last) = {n}/2 · ({first} + {last}) = {total}."
    )


def _statistics(rng: random.Random) -> str:
    values = [rng.randint(1, 40) for _ in range(rng.choice([5, 7, 9]))]
    ordered = sorted(values)
    mean = Fraction(sum(values), len(values))
    return (
        f"For the data {', '.join(map(str, values))} find the mean, the median and the range.\nSorted: "
        f"{', '.join(map(str, ordered))}. The sum is {sum(values)}, so the mean is {sum(values)}/{len(values)} ≈ "
        f"{float(mean):.2f}. The middle value of {len(values)} numbers is the number {len(values) // 2 + 1}, so the "
        f"median is "
        f"{ordered[len(values) // 2]}. The range is {ordered[-1]} - {ordered[0]} = {ordered[-1] - ordered[0]}."
    )


def _probability(rng: random.Random) -> str:
    red, blue, green = (rng.randint(2, 12) for _ in range(3))
    total = red + blue + green
    both = Fraction(red * (red - 1), total * (total - 1))
    return (
        f"A bag holds {red} red, {blue} blue and {green} green balls. Two balls are drawn without putting the first "
        f"one back. "
        f"What is the probability that both are red?\nThere are {total} balls. The first is red with probability "
        f"{red}/{total}; then {red - 1} of the remaining {total - 1} are red. Multiplying gives {red}/{total} · "
        f"{red - 1}/{total - 1} = {both} ≈ {float(both):.3f}."
    )


def _derivative(rng: random.Random) -> str:
    coefficients = [rng.choice([-4, -3, -2, -1, 1, 2, 3, 4, 5])] + [
        rng.randint(-9, 9) for _ in range(rng.choice([2, 3]))
    ]
    degree = len(coefficients) - 1
    slope = [c * (degree - i) for i, c in enumerate(coefficients[:-1])]
    point = rng.randint(-3, 3)
    value = 0
    for coefficient in slope:
        value = value * point + coefficient
    return (
        f"Let f(x) = {_polynomial(coefficients)}. Differentiate f and evaluate the derivative at x = {point}.\nThe "
        f"power rule "
        f"turns each term a·x^n into n·a·x^(n-1), and the constant term vanishes. Thus f'(x) = {_polynomial(slope)} "
        f"and "
        f"f'({point}) = {value}. The tangent at that point is "
        f"{'rising' if value > 0 else 'falling' if value < 0 else 'level'}."
    )


def _integral(rng: random.Random) -> str:
    a, b, low, high = rng.randint(1, 6) * 2, rng.randint(-8, 8), rng.randint(-3, 1), rng.randint(2, 6)
    upper, lower = a // 2 * high**2 + b * high, a // 2 * low**2 + b * low
    primitive = _polynomial([a // 2, b, 0])
    return (
        f"Evaluate the integral of {_polynomial([a, b])} from {low} to {high}.\nAn antiderivative is F(x) = "
        f"{primitive}. By the "
        f"fundamental theorem of calculus the integral equals F({high}) - F({low}) = {upper} - ({lower}) = "
        f"{upper - lower}."
    )


def _matrix(rng: random.Random) -> str:
    a, b, c, d, e, f, g, h = (rng.randint(-6, 9) for _ in range(8))
    return (
        f"Let A = [[{a}, {b}], [{c}, {d}]] and B = [[{e}, {f}], [{g}, {h}]]. Compute AB and det A.\nEach entry of "
        f"AB is a row of "
        f"A times a column of B: AB = [[{a * e + b * g}, {a * f + b * h}], [{c * e + d * g}, {c * f + d * h}]]. The "
        f"determinant "
        f"is det A = {a}·{d} - {b}·{c} = {a * d - b * c}"
        + (", so A is invertible." if a * d != b * c else ", so A has no inverse.")
    )


def _modular(rng: random.Random) -> str:
    base, exponent, modulus = rng.randint(2, 12), rng.choice([5, 6, 7, 9, 10, 12, 13]), rng.randint(7, 31)
    steps, value, square, rest = [], 1, base % modulus, exponent
    power = 1
    while rest:
        steps.append(f"{base}^{power} ≡ {square}")
        if rest & 1:
            value = value * square % modulus
        square, rest, power = square * square % modulus, rest >> 1, power * 2
    return (
        f"Find the remainder of {base}^{exponent} on division by {modulus}.\nRepeated squaring modulo {modulus} gives "
        f"{', '.join(steps)}. Since {exponent} is {exponent:b} in binary, multiplying the powers whose bit is set "
        f"yields "
        f"{base}^{exponent} ≡ {value} (mod {modulus})."
    )


def _factorisation(rng: random.Random) -> str:
    number = rng.randint(60, 9000)
    factors, rest, divisor = [], number, 2
    while rest > 1:
        if rest % divisor == 0:
            factors.append(divisor)
            rest //= divisor
        else:
            divisor += 1
    if len(factors) == 1:
        return (
            f"Is {number} a prime number?\nIt is enough to try the primes up to the square root, which is about "
            f"{math.sqrt(number):.1f}. None of them divides {number}, so {number} is prime."
        )
    powers = " · ".join(f"{p}^{factors.count(p)}" if factors.count(p) > 1 else str(p) for p in sorted(set(factors)))
    divisors = math.prod(factors.count(p) + 1 for p in set(factors))
    return (
        f"Write {number} as a product of primes.\nDividing by the smallest possible prime again and again gives "
        f"{number} = "
        f"{' · '.join(map(str, factors))} = {powers}. It therefore has {divisors} positive divisors."
    )


def _triangle(rng: random.Random) -> str:
    m, n, k = *sorted(rng.sample(range(1, 7), 2), reverse=True), rng.randint(1, 4)
    a, b, c = k * (m * m - n * n), k * 2 * m * n, k * (m * m + n * n)
    return (
        f"A right triangle has legs of length {a} cm and {b} cm. Find the hypotenuse and the area.\nBy the theorem "
        f"of Pythagoras "
        f"c^2 = {a}^2 + {b}^2 = {a * a} + {b * b} = {c * c}, so c = {c} cm. The area is half the product of the legs: "
        f"{a}·{b}/2 = {a * b / 2:g} square centimetres."
    )


def _bases(rng: random.Random) -> str:
    number, base = rng.randint(20, 900), rng.choice([2, 3, 5, 7, 8])
    digits, rest, lines = [], number, []
    while rest:
        lines.append(f"  {rest} : {base} = {rest // base}, remainder {rest % base}")
        digits.append(str(rest % base))
        rest //= base
    return (
        f"Convert the decimal number {number} to base {base}.\n"
        + "\n".join(lines)
        + f"\nReading the remainders from the last to "
        f"the first gives {''.join(reversed(digits))} in base {base}."
    )


def _interest(rng: random.Random) -> str:
    name, principal = rng.choice(NAMES), rng.randint(4, 80) * 100
    rate, years = rng.choice([1.5, 2, 2.5, 3, 4, 5]), rng.randint(2, 6)
    lines, balance = [], float(principal)
    for year in range(1, years + 1):
        balance *= 1 + rate / 100
        lines.append(f"after year {year}: {balance:.2f}")
    return (
        f"{name} puts {principal} francs into a savings account at {rate:g} percent interest a year, compounded "
        f"yearly. How much "
        f"is in the account after {years} years?\nEvery year the balance is multiplied by {1 + rate / 100:g}: "
        + "; ".join(lines)
        + f". In one formula: {principal} · {1 + rate / 100:g}^{years} ≈ {balance:.2f} francs."
    )


def _combinations(rng: random.Random) -> str:
    n, k = rng.randint(6, 14), rng.randint(2, 4)
    top = " · ".join(str(n - i) for i in range(k))
    bottom = " · ".join(str(k - i) for i in range(k - 1)) or "1"
    return (
        f"In how many ways can a committee of {k} be chosen from {n} people?\nThe order does not matter, so we count "
        f"combinations: C({n}, {k}) = ({top}) / ({bottom}) = {math.comb(n, k)}. If the {k} members took different "
        f"offices, the "
        f"order would matter and there would be {math.perm(n, k)} ways."
    )


def _multiplication(rng: random.Random) -> str:
    a, b = rng.randint(12, 999), rng.randint(12, 99)
    tens, ones = b // 10 * 10, b % 10
    return (
        f"Work out {a} × {b} without a calculator.\nSplit the second factor: {b} = {tens} + {ones}. Then {a} × "
        f"{tens} = "
        f"{a * tens} and {a} × {ones} = {a * ones}. Adding the two parts gives {a * tens} + {a * ones} = {a * b}."
    )


def _division(rng: random.Random) -> str:
    divisor, quotient = rng.randint(3, 48), rng.randint(12, 400)
    rest = rng.randint(0, divisor - 1)
    number, fruit = divisor * quotient + rest, rng.choice(FRUITS)
    return (
        f"{number} {fruit} are packed into boxes of {divisor}. How many boxes are filled, and how many {fruit} are "
        f"left?\n"
        f"{number} = {divisor} · {quotient} + {rest}, because {divisor} · {quotient} = {divisor * quotient} and "
        f"{number} - "
        f"{divisor * quotient} = {rest}. So {quotient} boxes are full and {rest} {fruit} remain."
    )


def _inequality(rng: random.Random) -> str:
    a, b, c = rng.randint(2, 9), rng.randint(-20, 20), rng.randint(-30, 40)
    bound = Fraction(c - b, -a)
    return (
        f"Solve the inequality -{a}x {_signed(b)} < {c}.\nSubtract {b}: -{a}x < {c - b}. Dividing by the negative "
        f"number -{a} "
        f"reverses the sign: x > {bound}. On the number line these are all points to the right of {float(bound):.2f}."
    )


def _induction(rng: random.Random) -> str:
    k = rng.randint(2, 9)
    return rng.choice(
        [
            f"Claim. The sum of the first n multiples of {k} is {k}·n(n + 1)/2.\nProof by induction. For n = 1 both "
            f"sides equal "
            f"{k}. Suppose the claim holds for n. Adding {k}(n + 1) to both sides gives {k}·n(n + 1)/2 + {k}(n + 1) = "
            f"{k}(n + 1)(n + 2)/2, which is the claim for n + 1.",
            f"Claim. For every n ≥ 0 the number {k + 1}^n - 1 is divisible by {k}.\nProof. For n = 0 it is 0. If "
            f"{k + 1}^n - 1 = "
            f"{k}m, then {k + 1}^(n+1) - 1 = {k + 1}·({k}m + 1) - 1 = {k}·({k + 1}m + 1), which is again a multiple "
            f"of {k}.",
            f"Claim. The product of any {k} consecutive integers is divisible by {math.factorial(k)}.\nProof. The "
            f"product "
            f"n(n - 1)…(n - {k - 1}) equals {k}! times the binomial coefficient C(n, {k}), and a binomial "
            f"coefficient counts the "
            f"{k}-element subsets of a set with n elements, so it is an integer. Here {k}! = {math.factorial(k)}.",
        ]
    )


def _logarithm(rng: random.Random) -> str:
    base, exponent, shift = rng.randint(2, 10), rng.randint(2, 5), rng.randint(1, 20)
    return (
        f"Solve log_{base}(x {_signed(-shift)}) = {exponent}.\nBy the definition of the logarithm x "
        f"{_signed(-shift)} = "
        f"{base}^{exponent} = {base**exponent}, so x = {base**exponent} + {shift} = {base**exponent + shift}. The "
        f"argument is "
        f"positive there, so the solution is admissible."
    )


def _units(rng: random.Random) -> str:
    kilometres, minutes = rng.randint(2, 60), rng.choice([6, 12, 15, 20, 30, 40, 45])
    speed = kilometres * 60 / minutes
    return (
        f"{rng.choice(NAMES)} cycles {kilometres} km in {minutes} minutes. Express the average speed in km/h and in "
        f"m/s.\n"
        f"{minutes} minutes are {minutes}/60 of an hour, so the speed is {kilometres} · 60/{minutes} = {speed:.4g} "
        f"km/h. Since "
        f"1 m/s is 3.6 km/h, this is {speed:.4g} / 3.6 ≈ {speed / 3.6:.2f} m/s."
    )


_PROBLEMS: tuple[Callable[[random.Random], str], ...] = (
    _linear_equation, _quadratic, _system, _fractions, _euclid, _percentage, _journey, _arithmetic_series, _statistics,
    _probability, _derivative, _integral, _matrix, _modular, _factorisation, _triangle, _bases, _interest, _combinations,
    _multiplication, _division, _inequality, _induction, _logarithm, _units,
)  # fmt: skip


def mathematics(rng: random.Random) -> str:
    """One page of one or two worked problems.

    Args:
        rng: The seeded source of every choice.

    Returns:
        Text of a few hundred characters.
    """
    problems = [problem(rng) for problem in rng.sample(_PROBLEMS, rng.choice([1, 1, 2]))]
    label = rng.choice(["Exercise", "Problem", "Example", "Question"])
    start = rng.randint(1, 80)
    return "\n\n".join(f"{label} {start + offset}. {text}" for offset, text in enumerate(problems))


_TOPICS: dict[str, tuple[tuple[str, ...], ...]] = {
    "travel": (
        (
            "Have you booked the train to {city} yet?",
            "When are we leaving for {city}?",
            "I found a cheap ticket to {city}.",
        ),
        (
            "Not yet. The one at {hour}:{minute} is nearly full, so we should decide tonight.",
            "There is one at {hour}:{minute} and another an hour later. Which suits you?",
            "Only {price} euros? Then let us take it before it is gone.",
        ),
        (
            "The earlier one, please. I would like to see the old harbour before dark.",
            "I don't mind changing once if it saves us {price} euros.",
            "Let me ask {name} first, who has to be back in {city2} by Monday.",
        ),
        (
            "Fine. I will bring sandwiches and the map, you bring the camera.",
            "All right, but this time we stay in the centre and not next to the airport.",
            "Good. And do not forget your passport again.",
        ),
        (
            "I forgot it once, {years} years ago!",
            "Agreed. See you at platform {small}.",
            "You will never let me forget that.",
        ),
    ),
    "cooking": (
        (
            "What are you making? It smells wonderful.",
            "Do we have enough {fruit} for the cake?",
            "Could you help me with dinner?",
        ),
        (
            "A stew with beans, tomatoes and a little smoked paprika. It needs {minutes} more minutes.",
            "About {small}. The recipe asks for more, but we can add a few raisins.",
            "Of course. Shall I peel the potatoes or wash the salad?",
        ),
        (
            "Did you salt the water? Last time it tasted of nothing.",
            "My grandmother in {city} always added a spoonful of vinegar at the end.",
            "Turn the heat down, otherwise it will burn at the bottom.",
        ),
        (
            "I did, twice. Try it and tell me what is missing.",
            "Vinegar? I would have used lemon, but let's try it her way.",
            "Done. {name} called, by the way; there will be {small} of us at the table.",
        ),
        ("Perfect. A little pepper, and it is ready.", "Then we need more bread.", "Good, I will lay the table."),
    ),
    "repair": (
        (
            "Hello, I brought in a {good} last week. Is it ready?",
            "Good morning. My {good} stopped working yesterday.",
            "Can this {good} be repaired, or should I buy a new one?",
        ),
        (
            "Let me look. What name was it under?",
            "What happened exactly? Did it fall, or did it just stop?",
            "It is old, but the parts can still be had. Give me a moment.",
        ),
        (
            "{surname}. You told me it would take {small} days.",
            "It made a strange noise, and then nothing happened any more.",
            "I would rather keep it. It belonged to my father.",
        ),
        (
            "Found it. The spring was broken; we replaced it and cleaned the rest.",
            "That sounds like a loose wire. It will cost about {price} euros, if nothing else is wrong.",
            "I understand. Then we will do our best. You can pick it up on {weekday}.",
        ),
        ("Thank you. Can I pay by card?", "That is less than I feared.", "Wonderful. I will come by after work."),
    ),
    "work": (
        (
            "Do you have a minute to look at the figures for {month}?",
            "The build has been failing since this morning. Any idea why?",
            "Who is taking over the project while {name} is away?",
        ),
        (
            "Sure. Which column worries you?",
            "I saw it. The test for the {word} service times out after {minutes} seconds.",
            "I thought you were. Nobody told me anything else.",
        ),
        (
            "The one for {city}. We sold {number} units and the table says {number2}.",
            "It passed yesterday, so it must be one of the last {small} changes.",
            "Then we should ask before the meeting on {weekday}.",
        ),
        (
            "Someone counted the returns twice. I will correct it and send you a new copy.",
            "Let us undo them one after the other until it passes. Start with the change to the cache.",
            "I will write a message now and put you in copy.",
        ),
        (
            "Thanks. Please add a note, so that we do not ask again next year.",
            "Good plan. I will write down what we find.",
            "Great. And let us keep the meeting short for once.",
        ),
    ),
    "health": (
        (
            "What brings you here today?",
            "How have you been since your last visit?",
            "Please sit down. How can I help you?",
        ),
        (
            "I have had a headache for {small} days, mostly in the evening.",
            "Better, but my knee still hurts when I climb the stairs.",
            "I cannot sleep. I wake up at {small} and lie there until morning.",
        ),
        (
            "Do you drink enough water during the day, and how long do you sit at a screen?",
            "Have you been doing the exercises I showed you in {month}?",
            "Has anything changed lately, at work or at home?",
        ),
        (
            "Not really, to be honest. I often forget to have lunch as well.",
            "In the first weeks, yes. Then I stopped.",
            "We moved to {city}, and the street is louder than I expected.",
        ),
        (
            "Let us start with that, and see each other again in {small} weeks.",
            "Begin again, slowly, and come back if it swells.",
            "Then try to keep the same hours every day, and write down how you slept.",
        ),
    ),
    "school": (
        (
            "I do not understand the exercise about {word}s. Can you explain it?",
            "Did you finish the essay on the history of {city}?",
            "What did the teacher say about the trip in {month}?",
        ),
        (
            "Which part? The first half is only about reading the table.",
            "Almost. I have {number} words and need {small} more sources.",
            "That we need a signature and {price} euros by {weekday}.",
        ),
        (
            "The question where you have to compare two groups of different size.",
            "The library has a book by {surname} on it, on the second floor.",
            "So much? Last year it was half of that.",
        ),
        (
            "Divide each by its total first. Shares can be compared, raw numbers cannot.",
            "I looked there; it is on loan until {weekday}. {name} has it, I think.",
            "It includes the museum and the night at the hostel.",
        ),
        (
            "Oh, now it makes sense.",
            "Then ask. He is nicer than he looks.",
            "All right. I will tell my parents tonight.",
        ),
    ),
    "market": (
        ("Good morning! What can I get you?", "Are these {fruit} from around here?", "How much are the {fruit} today?"),
        (
            "Two kilos of {fruit}, please, and something for a salad.",
            "From a farm near {city}. They were picked yesterday.",
            "{small} euros a kilo, or three kilos for a better price.",
        ),
        (
            "The lettuce is fresh. The tomatoes will be better next week.",
            "May I try one before I buy?",
            "That is more than last week, isn't it?",
        ),
        (
            "Then only the lettuce. And a bunch of parsley.",
            "Please do. Take that one, it is the ripest.",
            "It rained for {small} days, so there were fewer of them.",
        ),
        ("That makes {price} euros in all.", "Delicious. I will take a bag.", "I see. One kilo will do, then."),
    ),
    "music": (
        (
            "How long have you been playing the {instrument}?",
            "Did you hear the concert in {city} last {weekday}?",
            "We need someone who plays the {instrument} for {month}.",
        ),
        (
            "Since I was {small}. My aunt left me hers.",
            "No, I had a rehearsal myself. Was it good?",
            "Ask {name}. She played with us {years} years ago.",
        ),
        (
            "And do you practise every day?",
            "The first half was too loud, but the slow movement was beautiful.",
            "Still living in {city2}? Somebody told me so.",
        ),
        (
            "I try. Twenty minutes of scales, then something I enjoy.",
            "That is what {name} said as well. I am sorry I missed it.",
            "Not any more. We met at the market last {weekday}, next to the stall with the {fruit}.",
        ),
        ("That is the way to do it.", "They play again in {month}. Come with me.", "Then I will call this evening."),
    ),
    "house": (
        (
            "Is the flat in {street} Street still free?",
            "The heating has been cold since {weekday}. Could someone come?",
            "We would like to see the house with the garden.",
        ),
        (
            "It is. Two rooms, a kitchen and a small balcony on the third floor.",
            "I am sorry to hear that. Is it only your flat or the whole building?",
            "Gladly. Would {weekday} at {hour} suit you?",
        ),
        (
            "What is the rent, and is heating included?",
            "The neighbours below have the same problem.",
            "Yes. Is the roof as old as it looks in the pictures?",
        ),
        (
            "{rent} euros a month, water included, heating not.",
            "Then it is the boiler. A technician will be there before {hour}.",
            "It was renewed {years} years ago; only the shutters are original.",
        ),
        ("May I have a look this week?", "Thank you. I will leave the key with {name}.", "Good to know. See you then."),
    ),
    "nature": (
        (
            "Look, there is a heron on the other bank.",
            "How far is it to the hut?",
            "What did you plant in the bed next to the wall?",
        ),
        (
            "Where? Oh, between the reeds. I have never seen one so close.",
            "About {small} kilometres, but the last part is steep.",
            "Beans and sunflowers. The beans climb up the stems.",
        ),
        (
            "They nest in the trees behind the mill. {name} counted {small} pairs.",
            "Then let us rest here. The clouds over {city} look harmless.",
            "Does that work in so much shade?",
        ),
        (
            "More than last year, then. The cleaner water must have helped.",
            "I would rather go on. In the afternoon there may be a storm.",
            "Well enough. It gets sun from {small} o'clock until the evening.",
        ),
        (
            "Let us stay a while and watch.",
            "You are right. Drink something, and we go.",
            "I shall try it myself next spring.",
        ),
    ),
    "computer": (
        (
            "My screen went black after the update. What should I do?",
            "Why does the program say that the file is locked?",
            "I cannot log in; it says my password has expired.",
        ),
        (
            "Does the light on the front still blink when you press the button?",
            "Most likely another window still has it open. Which file is it?",
            "That happens after {number} days. Did you get the message with the link?",
        ),
        (
            "It blinks {small} times, and then it goes out.",
            "The one called {word}-{number}.csv, in the shared folder.",
            "I got it, but the link no longer works.",
        ),
        (
            "Unplug it, wait for {minutes} seconds, and plug it in again, without the second screen.",
            "Ask {name} to close the table, then try again. If that fails, restart the program.",
            "Then I will send you a new one. It is valid for {small} hours.",
        ),
        (
            "It works again. Thank you very much!",
            "That was it. {name} had it open since {weekday}.",
            "I have it. I am in.",
        ),
    ),
    "books": (
        (
            "What are you reading at the moment?",
            "Can you recommend something for the journey to {city}?",
            "I am looking for a present for {name}, who likes long novels.",
        ),
        (
            "A novel about a lighthouse keeper who counts ships. It is better than it sounds.",
            "Do you want something to laugh about or something to think about?",
            "Do you know the one about the {word} family? It has {number} pages.",
        ),
        (
            "And how does it end?",
            "Something short. I fall asleep after {small} pages on a train.",
            "I think {name} read it in {month}.",
        ),
        (
            "I will not tell you. You would never read it.",
            "Then take these stories. Each one lasts as long as a cup of tea.",
            "In that case try the letters of {surname}. They are funny and sad at once.",
        ),
        ("Lend it to me when you are done.", "That sounds right. I will take it.", "Perfect. Could you wrap it up?"),
    ),
}
_ASIDES = ("Let me think.", "Hm.", "One moment.", "Ah, yes.", "Right.", "Good question.", "I see.")
_STATEMENT_VERBS = ("said", "answered", "replied", "added", "explained")
_QUESTION_VERBS = ("asked", "wanted to know", "inquired")


def _fill(template: str, rng: random.Random) -> str:
    """Fills the slots of a dialogue line."""
    return template.format(
        city=rng.choice(CITIES), city2=rng.choice(CITIES), hour=rng.randint(6, 21), minute=rng.choice(["05", "20", "35", "50"]),
        price=rng.randint(4, 95), name=rng.choice(NAMES), surname=rng.choice(SURNAMES), years=rng.randint(3, 20),
        small=rng.randint(3, 12), minutes=rng.choice([10, 15, 20, 30, 40]), fruit=rng.choice(FRUITS), good=rng.choice(GOODS),
        weekday=rng.choice(["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"]), word=rng.choice(WORDS),
        month=rng.choice(["January", "March", "April", "June", "July", "September", "October", "December"]),
        number=rng.randint(40, 900), number2=rng.randint(40, 900), rent=rng.randint(40, 140) * 10,
        street=rng.choice(WORDS).capitalize(), instrument=rng.choice(["cello", "flute", "trumpet", "piano", "violin", "oboe"]),
    )  # fmt: skip


def _scene(topic: str, rng: random.Random) -> str:
    """One short conversation about a topic, as a transcript, as a chat or as prose."""
    branch = rng.randrange(3)
    lines = []
    for position, choices in enumerate(_TOPICS[topic]):
        aside = f"{rng.choice(_ASIDES)} " if position and rng.random() < 0.2 else ""
        lines.append(aside + _fill(choices[branch], rng))
    form = rng.random()
    if form < 0.3:
        return "\n".join(f"{'user' if i % 2 == 0 else 'assistant'}: {line}" for i, line in enumerate(lines))
    speakers = rng.sample(NAMES, 2)
    if form < 0.65:
        return "\n".join(f"{speakers[i % 2]}: {line}" for i, line in enumerate(lines))
    spoken = []
    for i, line in enumerate(lines):
        ending = line[:-1] + "," if line.endswith(".") else line
        verb = rng.choice(_QUESTION_VERBS if line.endswith("?") else _STATEMENT_VERBS)
        tag = f"{speakers[i % 2]} {verb}." if " " in verb else f"{verb} {speakers[i % 2]}."
        spoken.append(f"“{ending}” {tag}" if rng.random() < 0.6 else f"“{line}”")
    return "\n".join(spoken)


def dialogue(rng: random.Random) -> str:
    """One or two short conversations between two people, or between a user and an assistant.

    Args:
        rng: The seeded source of every choice.

    Returns:
        Text of a few hundred characters.
    """
    return "\n\n".join(_scene(topic, rng) for topic in rng.sample(sorted(_TOPICS), rng.choice([1, 2, 2])))


def _person(rng: random.Random) -> dict[str, object]:
    name, surname = rng.choice(NAMES), rng.choice(SURNAMES)
    return {
        "id": rng.randint(1000, 99999),
        "name": f"{name} {surname}",
        "email": f"{name.lower()}.{surname.lower()}@example.{rng.choice(['com', 'org', 'net'])}",
        "city": rng.choice(CITIES),
        "active": rng.random() < 0.7,
    }


def _date(rng: random.Random) -> str:
    return f"{rng.randint(2015, 2026)}-{rng.randint(1, 12):02d}-{rng.randint(1, 28):02d}"


def _time(rng: random.Random) -> str:
    return f"{rng.randint(0, 23):02d}:{rng.randint(0, 59):02d}:{rng.randint(0, 59):02d}"


def _address(rng: random.Random) -> str:
    return f"{rng.choice(['192.0.2', '198.51.100', '203.0.113'])}.{rng.randint(1, 254)}"


def _json_order(rng: random.Random) -> str:
    items = [
        {"sku": f"{rng.choice(WORDS)[:3].upper()}-{rng.randint(100, 999)}", "title": good, "quantity": rng.randint(1, 9),
         "price": rng.randint(199, 19999) / 100}
        for good in rng.sample(GOODS, rng.randint(1, 4))
    ]  # fmt: skip
    order = {"order": rng.randint(10000, 99999), "date": _date(rng), "customer": _person(rng), "items": items,
             "currency": rng.choice(["EUR", "USD", "JPY", "CHF"]), "paid": rng.random() < 0.8, "note": None}  # fmt: skip
    return json.dumps(order, indent=rng.choice([2, 4]), ensure_ascii=False)


def _json_lines(rng: random.Random) -> str:
    return "\n".join(json.dumps(_person(rng), ensure_ascii=False) for _ in range(rng.randint(3, 7)))


def _csv(rng: random.Random) -> str:
    if rng.random() < 0.5:
        rows = [f"{_date(rng)},{rng.choice(CITIES)},{rng.uniform(-8, 34):.1f},{rng.randint(20, 99)},{rng.uniform(0, 25):.1f}"
                for _ in range(rng.randint(6, 14))]  # fmt: skip
        return "date,station,temperature,humidity,rain_mm\n" + "\n".join(rows)
    rows = [f"{rng.randint(1, 9999)};{rng.choice(NAMES)};{rng.choice(SURNAMES)};{rng.choice(GOODS)};{rng.randint(1, 40)};"
            f"{rng.uniform(2, 300):.2f}" for _ in range(rng.randint(6, 12))]  # fmt: skip
    return "id;first_name;last_name;product;quantity;price\n" + "\n".join(rows)


def _yaml(rng: random.Random) -> str:
    name = rng.choice(WORDS)
    environment = "\n".join(
        f"        - name: {key}\n          value: \"{rng.choice(WORDS)}-{rng.randint(1, 99)}\""
        for key in rng.sample(["LOG_LEVEL", "REGION", "QUEUE", "CACHE_KEY", "TENANT", "FEATURE_SET"], rng.randint(1, 3))
    )  # fmt: skip
    return (
        f"apiVersion: apps/v1\nkind: Deployment\nmetadata:\n  name: {name}-{rng.choice(['api', 'worker', 'web'])}\n "
        f" labels:\n"
        f"    team: {rng.choice(WORDS)}\nspec:\n  replicas: {rng.randint(1, 9)}\n  template:\n    spec:\n      "
        f"containers:\n"
        f"      - name: {name}\n        image: registry.example.com/{name}:{rng.randint(0, 9)}.{rng.randint(0, 30)}\n"
        f"        ports:\n        - containerPort: {rng.choice([80, 443, 3000, 8000, 8080, 9090])}\n        "
        f"env:\n{environment}"
    )


def _sql(rng: random.Random) -> str:
    table = f"{rng.choice(WORDS)}_{rng.choice(['orders', 'users', 'events', 'stock'])}"
    rows = ",\n".join(
        f"  ({rng.randint(1, 9999)}, '{rng.choice(NAMES)}', '{rng.choice(CITIES)}', {rng.randint(1, 500)}, "
        f"'{_date(rng)}')"
        for _ in range(rng.randint(3, 7))
    )
    query = rng.choice(
        [
            f"SELECT city, SUM(amount) AS total FROM {table} GROUP BY city HAVING SUM(amount) > "
            f"{rng.randint(10, 900)} ORDER BY total DESC;",
            f"UPDATE {table} SET amount = amount + {rng.randint(1, 9)} WHERE city = '{rng.choice(CITIES)}';",
            f"SELECT name, amount FROM {table} WHERE created >= '{_date(rng)}' LIMIT {rng.randint(5, 50)};",
            f"CREATE INDEX {table}_city ON {table} (city, created);",
        ]
    )
    return (
        f"CREATE TABLE {table} (\n  id INTEGER PRIMARY KEY,\n  name TEXT NOT NULL,\n  city TEXT,\n  amount INTEGER "
        f"DEFAULT 0,\n"
        f"  created DATE\n);\nINSERT INTO {table} (id, name, city, amount, created) VALUES\n{rows};\n{query}"
    )


def _access_log(rng: random.Random) -> str:
    day = f"{rng.randint(1, 28):02d}/{rng.choice(['Jan', 'Mar', 'May', 'Aug', 'Oct', 'Dec'])}/{rng.randint(2018, 2026)}"
    return "\n".join(
        f'{_address(rng)} - - [{day}:{_time(rng)} +0000] "{rng.choice(["GET", "GET", "POST", "PUT"])} '
        f"/{rng.choice(WORDS)}/"
        f'{rng.randint(1, 999)} HTTP/1.1" {rng.choice([200, 200, 200, 204, 301, 403, 404, 500])} '
        f"{rng.randint(90, 48000)}"
        for _ in range(rng.randint(4, 8))
    )


def _service_log(rng: random.Random) -> str:
    service, day = rng.choice(WORDS), _date(rng)
    messages = (
        "connection from {a} accepted", "job {n} finished in {m} ms", "cache miss for key {w}:{n}", "retrying request {n} to {w}",
        "queue {w} holds {n} messages", "disk usage at {p} percent", "user {n} signed in", "timeout after {m} ms while reading {w}",
        "loaded {n} rows from {w}.csv", "health check passed in {m} ms",
    )  # fmt: skip
    return "\n".join(
        f"{day}T{_time(rng)}Z {rng.choice(['INFO', 'INFO', 'DEBUG', 'WARNING', 'ERROR'])} "
        f"{service}[{rng.randint(100, 9999)}]: "
        + rng.choice(messages).format(a=_address(rng), n=rng.randint(1, 9999), m=rng.randint(2, 4000), w=rng.choice(WORDS), p=rng.randint(10, 99))
        for _ in range(rng.randint(5, 9))
    )  # fmt: skip


def _ini(rng: random.Random) -> str:
    sections = []
    for section in rng.sample(["server", "database", "logging", "cache", "mail", "paths"], rng.randint(2, 4)):
        keys = rng.sample(["host", "port", "timeout", "user", "level", "size", "enabled", "path"], rng.randint(2, 5))
        values = {"host": _address(rng), "port": rng.randint(1024, 9999), "timeout": rng.randint(1, 60), "user": rng.choice(NAMES).lower(),
                  "level": rng.choice(["debug", "info", "warning"]), "size": f"{rng.randint(1, 512)}M", "enabled": rng.choice(["true", "false"]),
                  "path": f"/srv/{rng.choice(WORDS)}/{rng.choice(WORDS)}"}  # fmt: skip
        sections.append(f"[{section}]\n" + "\n".join(f"{key} = {values[key]}" for key in keys))
    return "\n\n".join(sections)


def _toml(rng: random.Random) -> str:
    name = f"{rng.choice(WORDS)}-{rng.choice(WORDS)}"
    packages = ", ".join(
        f'"{word}>={rng.randint(0, 5)}.{rng.randint(0, 20)}"' for word in rng.sample(WORDS, rng.randint(2, 5))
    )
    return (
        f'[project]\nname = "{name}"\nversion = "{rng.randint(0, 4)}.{rng.randint(0, 20)}.{rng.randint(0, 9)}"\n'
        f'description = "Tools for {rng.choice(WORDS)} and {rng.choice(WORDS)}"\nauthors = '
        f'[{{ name = "{rng.choice(NAMES)} '
        f'{rng.choice(SURNAMES)}" }}]\ndependencies = [{packages}]\n\n[tool.{rng.choice(WORDS)}]\nline-length = '
        f"{rng.choice([79, 88, 100, 120])}\nthreads = {rng.randint(1, 32)}\nstrict = {rng.choice(['true', 'false'])}"
    )


def _html_table(rng: random.Random) -> str:
    rows = "\n".join(
        f'  <tr id="r{rng.randint(1, 999)}"><td>{rng.choice(CITIES)}</td><td>{rng.choice(GOODS)}</td><td '
        f'class="number">{rng.randint(1, 990)}</td></tr>'
        for _ in range(rng.randint(3, 7))
    )
    return (
        f'<table class="{rng.choice(WORDS)}">\n  <caption>Stock on {_date(rng)}</caption>\n  '
        f"<tr><th>Branch</th><th>Article</th>"
        f"<th>Pieces</th></tr>\n{rows}\n</table>"
    )


def _markdown_table(rng: random.Random) -> str:
    rows = "\n".join(
        f"| {rng.choice(NAMES)} | {rng.choice(CITIES)} | {rng.uniform(0, 100):.1f} | {rng.randint(1, 60)} |"
        for _ in range(rng.randint(4, 8))
    )
    return f"| name | place | score | rank |\n|---|---|---:|---:|\n{rows}"


def _xml(rng: random.Random) -> str:
    entries = "\n".join(
        f'  <book id="b{rng.randint(100, 999)}" lang="{rng.choice(["en", "de", "fr", "es", "ja"])}">\n    <title>The '
        f"{rng.choice(WORDS)} and the {rng.choice(WORDS)}</title>\n    <author>{rng.choice(NAMES)} "
        f"{rng.choice(SURNAMES)}</author>\n"
        f"    <year>{rng.randint(1850, 2025)}</year>\n  </book>"
        for _ in range(rng.randint(1, 3))
    )
    return f'<?xml version="1.0" encoding="UTF-8"?>\n<catalogue branch="{rng.choice(CITIES)}">\n{entries}\n</catalogue>'


def _calendar(rng: random.Random) -> str:
    day = _date(rng).replace("-", "")
    hour = rng.randint(8, 17)
    return (
        f"BEGIN:VEVENT\nUID:{rng.randint(10**7, 10**8)}@example.org\nDTSTART:{day}T{hour:02d}{rng.choice(['00', '15', '30'])}00Z\n"
        f"DTEND:{day}T{hour + 1:02d}0000Z\nSUMMARY:{rng.choice(['Review', 'Rehearsal', 'Lunch', 'Inspection', 'Lesson'])} with "
        f"{rng.choice(NAMES)} {rng.choice(SURNAMES)}\nLOCATION:{rng.choice(CITIES)}, room {rng.randint(1, 40)}\nSTATUS:"
        f"{rng.choice(['CONFIRMED', 'TENTATIVE', 'CANCELLED'])}\nSEQUENCE:{rng.randint(0, 9)}\nEND:VEVENT"
    )


def _metrics(rng: random.Random) -> str:
    metric = f"{rng.choice(WORDS)}_{rng.choice(['requests_total', 'latency_seconds', 'queue_length', 'errors_total'])}"
    rows = "\n".join(
        f'{metric}{{host="{rng.choice(WORDS)}-{rng.randint(1, 9)}",zone="{rng.choice(CITIES).lower()}"}} '
        f"{rng.uniform(0, 5000):.3f}"
        for _ in range(rng.randint(3, 7))
    )
    return f"# HELP {metric} Reported by the {rng.choice(WORDS)} service.\n# TYPE {metric} {rng.choice(['counter', 'gauge'])}\n{rows}"


def _geojson(rng: random.Random) -> str:
    features = [
        {"type": "Feature", "geometry": {"type": "Point", "coordinates": [round(rng.uniform(-180, 180), 4), round(rng.uniform(-80, 80), 4)]},
         "properties": {"name": rng.choice(CITIES), "population": rng.randint(900, 900000)}}
        for _ in range(rng.randint(2, 4))
    ]  # fmt: skip
    return json.dumps(
        {"type": "FeatureCollection", "features": features}, indent=rng.choice([None, 1]), ensure_ascii=False
    )


_FORMATS: tuple[Callable[[random.Random], str], ...] = (
    _json_order, _json_lines, _csv, _yaml, _sql, _access_log, _service_log, _ini, _toml, _html_table, _markdown_table, _xml,
    _calendar, _metrics, _geojson,
)  # fmt: skip


def structured_data(rng: random.Random) -> str:
    """One small file in one of fifteen formats, with invented content.

    Args:
        rng: The seeded source of every choice.

    Returns:
        Text of a few hundred characters.
    """
    return rng.choice(_FORMATS)(rng)


GENERATORS: dict[str, Callable[[random.Random], str]] = {
    "mathematics": mathematics,
    "dialogue": dialogue,
    "structured-data": structured_data,
}
