//! Values of a recipe as TOML writes them, and names as people are told of them.

use super::expression::Value;

/// How a value is written.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A count.
    Whole,
    /// With a point or an exponent.
    Number,
    /// In quotes.
    Text,
    /// A list of texts.
    Texts,
    /// A list of numbers.
    Numbers,
}

/// A key with its section.
pub fn path(section: &str, key: &str) -> String {
    match section {
        "" => key.to_owned(),
        section => format!("{section}.{key}"),
    }
}

/// A name from elsewhere, on one line.
pub fn clean(text: &str) -> String {
    let clean = |c: char| if c.is_control() { ' ' } else { c };
    text.chars().map(clean).collect()
}

/// As a number.
pub fn number(value: &Value) -> Option<f64> {
    match value {
        Value::Whole(number) => Some(*number as f64),
        Value::Real(number) => Some(*number),
        _ => None,
    }
}

/// A list of numbers.
pub fn numbers(values: &[f64]) -> Value {
    Value::List(values.iter().map(|value| Value::Real(*value)).collect())
}

/// A value in TOML. What is not of the kind is written as it is, for the loader to refuse.
pub fn toml(value: &Value, kind: Kind) -> String {
    match value {
        Value::Nothing => text("None"),
        Value::Bool(value) => value.to_string(),
        Value::Whole(number) if kind == Kind::Number => real(*number as f64),
        Value::Whole(number) => whole(*number),
        // A count such as 3e6.
        Value::Real(number) if kind == Kind::Whole && number.fract() == 0.0 && number.abs() < 9e15 => {
            whole(*number as i64)
        }
        Value::Real(number) => real(*number),
        Value::Text(value) => text(value),
        Value::List(values) => {
            let kind = if kind == Kind::Numbers {
                Kind::Number
            } else {
                Kind::Text
            };
            let values: Vec<_> = values.iter().map(|value| toml(value, kind)).collect();
            format!("[{}]", values.join(", "))
        }
    }
}

/// Text in TOML.
pub fn text(text: &str) -> String {
    toml::Value::String(text.into()).to_string()
}

/// As people write it: 5e-4, 0.001, 10.0.
fn real(number: f64) -> String {
    match number.abs() {
        size if size > 0.0 && size < 1e-3 => format!("{number:e}"),
        _ => format!("{number:?}"),
    }
}

/// With separators from 10,000 on.
pub fn whole(number: i64) -> String {
    match number {
        -9999..=9999 => number.to_string(),
        _ => group(number, '_'),
    }
}

/// Digits in threes.
pub fn group(number: i64, separator: char) -> String {
    let digits = number.unsigned_abs().to_string();
    let mut grouped = if number < 0 { "-".to_owned() } else { String::new() };
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            grouped.push(separator);
        }
        grouped.push(digit);
    }
    grouped
}
