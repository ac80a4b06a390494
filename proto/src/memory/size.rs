//! Sizes as people type them: `80GiB`, `32GB`, `512MiB`. A number without a unit is refused, because nobody can tell which
//! was meant.

const UNITS: [(&str, u64); 9] = [
    ("B", 1),
    ("KiB", 1 << 10),
    ("MiB", 1 << 20),
    ("GiB", 1 << 30),
    ("TiB", 1 << 40),
    ("kB", 1_000),
    ("MB", 1_000_000),
    ("GB", 1_000_000_000),
    ("TB", 1_000_000_000_000),
];

/// Bytes of a size.
///
/// # Errors
/// What is wrong with it, and what to type.
pub fn parse(text: &str) -> Result<u64, String> {
    let text = text.trim();
    let digits = text
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(text.len());
    let (number, unit) = (&text[..digits], text[digits..].trim_start());
    let Ok(number) = number.parse::<f64>() else {
        return Err(format!("{text:?} is not a size; as in 80GiB"));
    };
    if unit.is_empty() {
        return Err(format!("{text:?} has no unit; {text}GiB or {text}GB"));
    }
    let known = UNITS.iter().find(|(name, _)| name.eq_ignore_ascii_case(unit));
    let Some((_, factor)) = known else {
        return Err(format!("{unit:?} is not a unit; MiB, GiB, TiB, MB, GB or TB"));
    };
    let bytes = number * *factor as f64;
    match bytes >= 1.0 && bytes < u64::MAX as f64 {
        true => Ok(bytes as u64),
        false => Err(format!("{text:?} is no amount of memory; as in 80GiB")),
    }
}

/// The size that [`parse`] reads as so many bytes, in the largest unit that leaves no rest. Above 2^53 bytes a rest is lost.
pub fn exact(bytes: u64) -> String {
    let fits = UNITS.iter().filter(|(_, factor)| bytes.is_multiple_of(*factor));
    match fits.max_by_key(|(_, factor)| factor) {
        Some((unit, factor)) => format!("{}{unit}", bytes / factor),
        None => format!("{bytes}B"),
    }
}

/// A share of a whole, `8%` as 0.08.
///
/// # Errors
/// What is wrong with it, and what to type.
pub fn parse_percent(text: &str) -> Result<f64, String> {
    let Some(number) = text.trim().strip_suffix('%') else {
        return Err(format!("{text:?} has no unit; as in 8%"));
    };
    match number.trim().parse::<f64>() {
        Ok(percent) if (0.0..100.0).contains(&percent) => Ok(percent / 100.0),
        _ => Err(format!("{text:?} is not between 0% and 100%")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        assert_eq!(parse("80GiB"), Ok(80 << 30));
        assert_eq!(parse("80 gib"), Ok(80 << 30));
        assert_eq!(parse("32GB"), Ok(32_000_000_000));
        assert_eq!(parse("1.5MiB"), Ok(3 << 19));
        for (text, about) in [
            ("80", "80GiB or 80GB"),
            ("80G", "is not a unit"),
            ("GiB", "is not a size"),
            ("-1GiB", "is not a size"),
            ("0GiB", "no amount"),
            ("1.2.3GiB", "is not a size"),
            ("99999999999TiB", "no amount"),
        ] {
            let error = parse(text).expect_err(text);
            assert!(error.contains(about), "{text}: {error}");
        }
    }

    #[test]
    fn sizes_are_written_as_they_are_read() {
        for (bytes, text) in [
            (4u64 << 30, "4GiB"),
            (3 << 29, "1536MiB"),
            (4_000_000_000, "4GB"),
            (37_633, "37633B"),
        ] {
            assert_eq!(exact(bytes), text);
            assert_eq!(parse(text), Ok(bytes));
        }
    }

    #[test]
    fn percents() {
        assert_eq!(parse_percent("8%"), Ok(0.08));
        assert!(parse_percent("8").is_err_and(|error| error.contains("8%")));
        assert!(parse_percent("100%").is_err() && parse_percent("x%").is_err());
    }
}
