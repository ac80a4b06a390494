//! The value of a Python expression, as far as it follows from literals, arithmetic and names that have a value.
//! Anything else ends with the reason: calls, comprehensions, strings that are formatted. Nothing is executed, and
//! depth and size are bounded, whatever the text.

use super::lex::{Placed, Token};
use std::fmt;

/// Brackets and operators inside each other.
const DEEPEST: usize = 40;
/// Elements of a list, and characters of a string.
const LONGEST: usize = 4096;

/// A value of a recipe.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// `None`.
    Nothing,
    /// `True`, `False`.
    Bool(bool),
    /// A whole number.
    Whole(i64),
    /// A number with a fraction.
    Real(f64),
    /// A string.
    Text(String),
    /// A list or a tuple of anything but lists.
    List(Vec<Value>),
}

impl fmt::Display for Value {
    /// As Python writes it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Value::Nothing => f.write_str("None"),
            Value::Bool(true) => f.write_str("True"),
            Value::Bool(false) => f.write_str("False"),
            Value::Whole(number) => write!(f, "{number}"),
            Value::Real(number) => write!(f, "{number:?}"),
            Value::Text(text) => write!(f, "{text:?}"),
            Value::List(values) => {
                let values: Vec<_> = values.iter().map(ToString::to_string).collect();
                write!(f, "[{}]", values.join(", "))
            }
        }
    }
}

impl Value {
    /// What `if` makes of it.
    pub fn is_true(&self) -> bool {
        match self {
            Value::Nothing => false,
            Value::Bool(value) => *value,
            Value::Whole(number) => *number != 0,
            Value::Real(number) => *number != 0.0,
            Value::Text(text) => !text.is_empty(),
            Value::List(values) => !values.is_empty(),
        }
    }

    /// As a number, which truth values are too in Python.
    fn number(&self) -> Option<f64> {
        match self {
            Value::Real(number) => Some(*number),
            _ => self.whole().map(|number| number as f64),
        }
    }

    fn whole(&self) -> Option<i64> {
        match self {
            Value::Whole(number) => Some(*number),
            Value::Bool(value) => Some(i64::from(*value)),
            _ => None,
        }
    }

    /// Python's `==`.
    fn equals(&self, other: &Value) -> bool {
        match (self, other) {
            (Value::List(a), Value::List(b)) => {
                a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a.equals(b))
            }
            _ => match (self.number(), other.number()) {
                (Some(a), Some(b)) => a == b,
                _ => self == other,
            },
        }
    }
}

/// Why an expression has no value here; ends the sentence "it is not evaluated: ...".
pub type Why = String;

/// What names stand for.
pub trait Names {
    /// A variable's value.
    fn variable(&self, name: &str) -> Result<Value, Why>;
    /// The value of `config.KEY` or `config["KEY"]`; `None` if `object` is not the recipe.
    fn setting(&self, object: &str, key: &str) -> Option<Result<Value, Why>>;
}

/// Evaluates an expression that takes all of the tokens.
///
/// # Errors
/// The reason why it has no value.
pub fn evaluate(tokens: &[Placed], names: &dyn Names) -> Result<Value, Why> {
    let mut reader = Reader {
        tokens,
        names,
        depth: 0,
    };
    let value = reader.list_without_brackets()?;
    match reader.tokens.first() {
        None => Ok(value),
        Some(rest) => Err(unexpected(rest)),
    }
}

/// Applies a binary operator, as an augmented assignment does.
///
/// # Errors
/// The reason why it has no value.
pub fn apply(operator: &str, left: &Value, right: &Value) -> Result<Value, Why> {
    use Value::{List, Text, Whole};
    match (operator, left, right) {
        ("+", Text(a), Text(b)) => return short(Text(format!("{a}{b}"))),
        ("+", List(a), List(b)) => return short(List([a.as_slice(), b].concat())),
        ("*", Text(text), times) | ("*", times, Text(text)) if times.whole().is_some() => {
            let times = usize::try_from(times.whole().unwrap_or(0)).unwrap_or(0);
            return match text.len().saturating_mul(times) <= LONGEST {
                true => Ok(Text(text.repeat(times))),
                false => Err(too_long()),
            };
        }
        _ => {}
    }
    let by_zero = || "it divides by zero".to_owned();
    if let (Some(a), Some(b)) = (left.whole(), right.whole()) {
        let result = match operator {
            "+" => a.checked_add(b),
            "-" => a.checked_sub(b),
            "*" => a.checked_mul(b),
            "//" | "%" | "/" if b == 0 => return Err(by_zero()),
            // Python rounds down, and the remainder has the divisor's sign.
            "//" => a
                .checked_div_euclid(b)
                .map(|q| if b < 0 && a.rem_euclid(b) != 0 { q - 1 } else { q }),
            "%" => a
                .checked_rem_euclid(b)
                .map(|r| if b < 0 && r != 0 { r + b } else { r }),
            "/" => return finite(a as f64 / b as f64),
            "**" if b < 0 => return finite((a as f64).powf(b as f64)),
            "**" => u32::try_from(b).ok().and_then(|b| a.checked_pow(b)),
            _ => return Err(format!("it uses {operator:?}")),
        };
        return result
            .map(Whole)
            .ok_or_else(|| "a number of more than 63 bits".to_owned());
    }
    let (Some(a), Some(b)) = (left.number(), right.number()) else {
        return Err(format!("{operator:?} of {left} and {right}"));
    };
    match operator {
        "+" => finite(a + b),
        "-" => finite(a - b),
        "*" => finite(a * b),
        "/" | "//" | "%" if b == 0.0 => Err(by_zero()),
        "/" => finite(a / b),
        "//" => finite((a / b).floor()),
        "%" => finite(a - b * (a / b).floor()),
        "**" => finite(a.powf(b)),
        _ => Err(format!("it uses {operator:?}")),
    }
}

fn finite(number: f64) -> Result<Value, Why> {
    match number.is_finite() {
        true => Ok(Value::Real(number)),
        false => Err("it is not a finite number".to_owned()),
    }
}

fn too_long() -> Why {
    format!("a string or list of more than {LONGEST}")
}

fn short(value: Value) -> Result<Value, Why> {
    let size = match &value {
        Value::Text(text) => text.len(),
        Value::List(values) => values
            .iter()
            .map(|value| {
                if let Value::Text(text) = value {
                    1 + text.len()
                } else {
                    1
                }
            })
            .sum(),
        _ => 0,
    };
    if size <= LONGEST {
        Ok(value)
    } else {
        Err(too_long())
    }
}

fn unexpected(placed: &Placed) -> Why {
    match &placed.token {
        Token::Name(name) if name == "lambda" => "it is a function".to_owned(),
        Token::Name(name) if name == "for" => "it is a comprehension".to_owned(),
        Token::Name(name) => format!("{name:?} was not expected"),
        Token::Sign("(") => "it calls a function".to_owned(),
        Token::Sign("[") => "it takes an element of something".to_owned(),
        Token::Sign(".") => "it takes an attribute of something".to_owned(),
        Token::Sign("{") => "it is a dictionary or a set".to_owned(),
        Token::Sign(sign) => format!("it uses {sign:?}"),
        Token::Other(what) => format!("it has {what}"),
        _ => "two values without an operator between them".to_owned(),
    }
}

/// Binary operators, loosest first; `not` and comparisons stand above them.
const LEVELS: [&[&str]; 2] = [&["+", "-"], &["*", "/", "//", "%"]];
const COMPARISONS: [&str; 6] = ["==", "!=", "<=", ">=", "<", ">"];

struct Reader<'a> {
    tokens: &'a [Placed],
    names: &'a dyn Names,
    depth: usize,
}

impl Reader<'_> {
    fn sign(&mut self, wanted: &[&'static str]) -> Option<&'static str> {
        match self.tokens.first()?.token {
            Token::Sign(sign) if wanted.contains(&sign) => {
                self.tokens = &self.tokens[1..];
                Some(sign)
            }
            _ => None,
        }
    }

    fn word(&mut self, wanted: &str) -> bool {
        let found =
            matches!(self.tokens.first().map(|p| &p.token), Some(Token::Name(name)) if name == wanted);
        if found {
            self.tokens = &self.tokens[1..];
        }
        found
    }

    fn at_end_of_list(&self) -> bool {
        matches!(
            self.tokens.first().map(|p| &p.token),
            None | Some(Token::Sign(")" | "]"))
        )
    }

    /// Runs `read` one level deeper.
    fn deeper(&mut self, read: impl FnOnce(&mut Self) -> Result<Value, Why>) -> Result<Value, Why> {
        self.depth += 1;
        if self.depth > DEEPEST {
            return Err(format!("more than {DEEPEST} levels inside each other"));
        }
        let value = read(self);
        self.depth -= 1;
        value
    }

    /// `a`, or the tuple `a, b`.
    fn list_without_brackets(&mut self) -> Result<Value, Why> {
        let first = self.choice()?;
        match self.sign(&[","]) {
            Some(_) => self.list_after(vec![first]),
            None => Ok(first),
        }
    }

    /// The rest of a list, up to its bracket.
    fn list_after(&mut self, mut values: Vec<Value>) -> Result<Value, Why> {
        while !self.at_end_of_list() {
            values.push(self.choice()?);
            if self.sign(&[","]).is_none() {
                break;
            }
        }
        if values.iter().any(|value| matches!(value, Value::List(_))) {
            return Err("lists in lists".to_owned());
        }
        short(Value::List(values))
    }

    /// `a if condition else b`. Both sides must have a value.
    fn choice(&mut self) -> Result<Value, Why> {
        self.deeper(|reader| {
            let yes = reader.either()?;
            if !reader.word("if") {
                return Ok(yes);
            }
            let condition = reader.either()?;
            if !reader.word("else") {
                return Err("\"if\" without \"else\"".to_owned());
            }
            let no = reader.choice()?;
            Ok(if condition.is_true() { yes } else { no })
        })
    }

    fn either(&mut self) -> Result<Value, Why> {
        let mut value = self.both()?;
        while self.word("or") {
            let right = self.both()?;
            value = if value.is_true() { value } else { right };
        }
        Ok(value)
    }

    fn both(&mut self) -> Result<Value, Why> {
        let mut value = self.negation()?;
        while self.word("and") {
            let right = self.negation()?;
            value = if value.is_true() { right } else { value };
        }
        Ok(value)
    }

    fn negation(&mut self) -> Result<Value, Why> {
        if self.word("not") {
            let value = self.deeper(Self::negation)?;
            return Ok(Value::Bool(!value.is_true()));
        }
        self.comparison()
    }

    fn comparison(&mut self) -> Result<Value, Why> {
        let mut left = self.binary(0)?;
        let mut result = None;
        loop {
            let holds = if let Some(sign) = self.sign(&COMPARISONS) {
                let right = self.binary(0)?;
                let holds = compare(sign, &left, &right)?;
                left = right;
                holds
            } else if self.word("is") {
                let negated = self.word("not");
                let right = self.binary(0)?;
                let holds = left == right;
                left = right;
                holds != negated
            } else {
                let negated = self.word("not");
                if !self.word("in") {
                    return match (negated, result) {
                        (true, _) => Err("\"not\" was not expected".to_owned()),
                        (false, Some(all)) => Ok(Value::Bool(all)),
                        (false, None) => Ok(left),
                    };
                }
                let right = self.binary(0)?;
                let holds = contains(&right, &left)?;
                left = right;
                holds != negated
            };
            result = Some(result.unwrap_or(true) && holds);
        }
    }

    fn binary(&mut self, level: usize) -> Result<Value, Why> {
        let Some(operators) = LEVELS.get(level) else {
            return self.signed();
        };
        let mut value = self.binary(level + 1)?;
        while let Some(operator) = self.sign(operators) {
            let right = self.binary(level + 1)?;
            value = apply(operator, &value, &right)?;
        }
        Ok(value)
    }

    fn signed(&mut self) -> Result<Value, Why> {
        match self.sign(&["-", "+"]) {
            Some(sign) => {
                let value = self.deeper(Self::signed)?;
                apply(sign, &Value::Whole(0), &value)
            }
            None => self.power(),
        }
    }

    fn power(&mut self) -> Result<Value, Why> {
        let base = self.atom()?;
        match self.sign(&["**"]) {
            Some(operator) => {
                let exponent = self.deeper(Self::signed)?;
                apply(operator, &base, &exponent)
            }
            None => Ok(base),
        }
    }

    fn atom(&mut self) -> Result<Value, Why> {
        let Some((first, rest)) = self.tokens.split_first() else {
            return Err("a value is missing".to_owned());
        };
        let opening = self.tokens;
        self.tokens = rest;
        let value = match &first.token {
            Token::Whole(number) => Value::Whole(*number),
            Token::Real(number) => Value::Real(*number),
            Token::Text(text) => self.adjacent(text.clone())?,
            Token::Sign("(") => self.deeper(|reader| {
                let value = match reader.at_end_of_list() {
                    true => Value::List(Vec::new()),
                    false => reader.list_without_brackets()?,
                };
                reader.closed(")", value)
            })?,
            Token::Sign("[") => self.deeper(|reader| {
                let value = reader.list_after(Vec::new())?;
                reader.closed("]", value)
            })?,
            Token::Name(name) => match name.as_str() {
                "None" => Value::Nothing,
                "True" => Value::Bool(true),
                "False" => Value::Bool(false),
                "lambda" => return Err(unexpected(first)),
                name => match key_after(rest) {
                    Some((key, length)) if self.names.setting(name, key).is_some() => {
                        self.tokens = &rest[length..];
                        let setting = self.names.setting(name, key);
                        setting.unwrap_or_else(|| Err(unexpected(first)))?
                    }
                    // What a call's or an attribute's object is does not matter.
                    _ if matches!(rest.first().map(|p| &p.token), Some(Token::Sign("(" | "." | "["))) => {
                        return Err(unexpected(&rest[0]));
                    }
                    _ => self.names.variable(name)?,
                },
            },
            _ => return Err(unexpected(&opening[0])),
        };
        match self.tokens.first() {
            Some(next) if matches!(next.token, Token::Sign("(" | "[" | ".")) => Err(unexpected(next)),
            _ => Ok(value),
        }
    }

    fn closed(&mut self, bracket: &'static str, value: Value) -> Result<Value, Why> {
        match (self.sign(&[bracket]), self.tokens.first()) {
            (Some(_), _) => Ok(value),
            (None, Some(next)) => Err(unexpected(next)),
            (None, None) => Err(format!("{bracket:?} is missing")),
        }
    }

    /// Strings that stand beside each other are one.
    fn adjacent(&mut self, mut text: String) -> Result<Value, Why> {
        while let Some(Placed {
            token: Token::Text(more),
            ..
        }) = self.tokens.first()
        {
            text.push_str(more);
            self.tokens = &self.tokens[1..];
        }
        short(Value::Text(text))
    }
}

/// The key of `.KEY` or `["KEY"]` at the start of some tokens, and how many tokens that is.
pub fn key_after(tokens: &[Placed]) -> Option<(&str, usize)> {
    let token = |index: usize| tokens.get(index).map(|placed| &placed.token);
    match (token(0)?, token(1)?, token(2)) {
        (Token::Sign("."), Token::Name(key), _) => Some((key, 2)),
        (Token::Sign("["), Token::Text(key), Some(Token::Sign("]"))) => Some((key, 3)),
        _ => None,
    }
}

fn compare(sign: &str, left: &Value, right: &Value) -> Result<bool, Why> {
    let order = match (sign, left, right) {
        ("==", ..) => return Ok(left.equals(right)),
        ("!=", ..) => return Ok(!left.equals(right)),
        (_, Value::Text(a), Value::Text(b)) => Some(a.cmp(b)),
        _ => left
            .number()
            .zip(right.number())
            .and_then(|(a, b)| a.partial_cmp(&b)),
    };
    let order = order.ok_or_else(|| format!("{sign:?} of {left} and {right}"))?;
    Ok(match sign {
        "<" => order.is_lt(),
        "<=" => order.is_le(),
        ">" => order.is_gt(),
        _ => order.is_ge(),
    })
}

fn contains(whole: &Value, part: &Value) -> Result<bool, Why> {
    match (whole, part) {
        (Value::List(values), part) => Ok(values.iter().any(|value| value.equals(part))),
        (Value::Text(text), Value::Text(part)) => Ok(text.contains(part.as_str())),
        _ => Err(format!("\"in\" of {part} and {whole}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::recipe::lex;

    struct Known;
    impl Names for Known {
        fn variable(&self, name: &str) -> Result<Value, Why> {
            match name {
                "n" => Ok(Value::Whole(8)),
                _ => Err(format!("{name:?} has no value")),
            }
        }
        fn setting(&self, object: &str, key: &str) -> Option<Result<Value, Why>> {
            (object == "config").then(|| match key {
                "lr" => Ok(Value::Real(0.5)),
                _ => Err(format!("{key} is not set")),
            })
        }
    }

    fn value(source: &str) -> String {
        let lines = lex::lines(source).expect("Python");
        match evaluate(&lines[0].tokens, &Known) {
            Ok(value) => value.to_string(),
            Err(why) => why,
        }
    }

    /// The right-hand sides are what Python prints, or our reason.
    #[test]
    fn expressions_have_pythons_values() {
        let cases = [
            ("30 * 10000", "300000"),
            ("512 * 8 / 2", "2048.0"),
            ("-1", "-1"),
            ("-2 ** 2", "-4"),
            ("2 ** -1", "0.5"),
            ("2 ** 3 ** 2", "512"),
            ("-7 // 2", "-4"),
            ("7 // -2", "-4"),
            ("-7 % 3", "2"),
            ("7 % -3", "-2"),
            ("6 // -2", "-3"),
            ("6 % -3", "0"),
            ("7.5 // 2", "3.0"),
            ("True + 1", "2"),
            ("(1.0, 0.0, 0.4)", "[1.0, 0.0, 0.4]"),
            ("1, 2,", "[1, 2]"),
            ("(1)", "1"),
            ("(1,)", "[1]"),
            ("[]", "[]"),
            ("()", "[]"),
            ("['lfw', \"cfp_fp\" '_x',]", "[\"lfw\", \"cfp_fp_x\"]"),
            ("'/data' + '/' + 'x'", "\"/data/x\""),
            ("'ab' * 2", "\"abab\""),
            ("n * config.lr", "4.0"),
            ("config['lr']", "0.5"),
            ("1 if n == 8 else 2", "1"),
            ("n in (1, 8) and not n > 9", "True"),
            ("'x' not in 'abc'", "True"),
            ("1 < n < 8", "False"),
            ("None is not None or 3", "3"),
            ("1 == 1.0 == True", "True"),
            ("config.other", "other is not set"),
            ("m + 1", "\"m\" has no value"),
            ("int(3)", "it calls a function"),
            ("os.path", "it takes an attribute of something"),
            ("[1, 2][0]", "it takes an element of something"),
            ("[x for x in y]", "\"x\" has no value"),
            ("[1 for x in y]", "it is a comprehension"),
            ("lambda e: 1", "it is a function"),
            ("{'a': 1}", "it is a dictionary or a set"),
            ("f'{n}'", "it has a formatted string"),
            ("1 / 0", "it divides by zero"),
            ("1e308 * 10", "it is not a finite number"),
            ("2 ** 63", "a number of more than 63 bits"),
            ("-9223372036854775807 - 2", "a number of more than 63 bits"),
            ("'a' + 1", "\"+\" of \"a\" and 1"),
            ("'a' * 5000", "a string or list of more than 4096"),
            ("1 | 2", "it uses \"|\""),
            ("((1, 2), 3)", "lists in lists"),
            ("1 2", "two values without an operator between them"),
            ("1 not 2", "\"not\" was not expected"),
            ("1 +", "a value is missing"),
        ];
        for (source, expected) in cases {
            assert_eq!(value(source), expected, "{source}");
        }
    }

    #[test]
    fn depth_is_bounded() {
        for (open, close) in [("(", ")"), ("-", ""), ("not ", ""), ("1 ** ", "")] {
            let source = format!("{}1{}", open.repeat(50_000), close.repeat(50_000));
            assert_eq!(value(&source), "more than 40 levels inside each other");
        }
        let choices = format!("{}1", "1 if 1 else ".repeat(50_000));
        assert_eq!(value(&choices), "more than 40 levels inside each other");
    }
}
