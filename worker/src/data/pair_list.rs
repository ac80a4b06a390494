//! Lists of pairs for a verification set. Two layouts: a line a pair with two paths and 0 or 1, or the `pairs.txt` of
//! LFW ("name i j" for one person, "name i other j" for two; image i of a person is `name/name_000i.jpg`). Pure.

use std::{path::PathBuf, str::FromStr};

/// How a list is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// Two paths and 0 or 1, separated by tabs, commas or blanks.
    List,
    /// The pairs.txt of LFW.
    Lfw,
}

impl FromStr for Layout {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "list" => Ok(Self::List),
            "lfw" => Ok(Self::Lfw),
            other => Err(format!("{other:?} is neither list nor lfw")),
        }
    }
}

/// An image of a pair.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Picture {
    /// A file.
    File(PathBuf),
    /// A file of LFW's layout, without its ending.
    Stem(PathBuf),
}

/// Two images.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pair {
    /// Line of the list, from 1.
    pub line: u64,
    /// Both images.
    pub pictures: [Picture; 2],
    /// Whether they show the same person.
    pub same: bool,
}

/// The pairs of a list, in its order; without a layout, that of the first line. Errors name the line.
pub fn parse(text: &str, layout: Option<Layout>) -> Result<Vec<Pair>, String> {
    let text = text.trim_start_matches('\u{feff}');
    let mut lines = (1u64..)
        .zip(text.lines().map(str::trim))
        .filter(|(_, line)| !line.is_empty())
        .peekable();
    let Some(&(_, first)) = lines.peek() else {
        return Err("there are no pairs".into());
    };
    let layout = layout.unwrap_or_else(|| guess(&fields(first)));
    let mut promised = None;
    if layout == Layout::Lfw
        && let Some(pairs) = header(&fields(first))
    {
        promised = Some(pairs);
        lines.next();
    }
    let pairs = lines
        .map(|(line, text)| {
            let pair = match layout {
                Layout::List => list_pair(&fields(text)),
                Layout::Lfw => lfw_pair(&fields(text)),
            };
            match pair {
                Ok((pictures, same)) => Ok(Pair { line, pictures, same }),
                // The number of parts is about the line as a whole.
                Err(Broken::Parts(what)) => Err(format!("line {line} {what}")),
                Err(Broken::Part(what)) => Err(format!("line {line}: {what}")),
            }
        })
        .collect::<Result<Vec<_>, _>>()?;
    match promised {
        Some(promised) if promised != pairs.len() as u64 => Err(format!(
            "the first line promises {promised} pairs, there are {}: the list is cut off",
            pairs.len()
        )),
        _ if pairs.is_empty() => Err("there are no pairs".into()),
        _ => Ok(pairs),
    }
}

/// What is wrong with a line.
enum Broken {
    Parts(String),
    Part(String),
}

/// Names may have blanks where tabs or commas separate.
fn fields(line: &str) -> Vec<&str> {
    let separator = ['\t', ',']
        .into_iter()
        .find(|&separator| line.contains(separator));
    match separator {
        Some(separator) => line.split(separator).map(str::trim).collect(),
        None => line.split_whitespace().collect(),
    }
}

fn number(text: &str) -> Option<u64> {
    text.parse().ok()
}

fn guess(first: &[&str]) -> Layout {
    let is_number = |&index: &usize| first.get(index).is_some_and(|field| number(field).is_some());
    let numbers: Vec<usize> = (0..first.len()).filter(is_number).collect();
    match (first.len(), numbers.as_slice()) {
        (1, [0]) | (2, [0, 1]) | (3, [1, 2]) | (4, [.., 3]) => Layout::Lfw,
        _ => Layout::List,
    }
}

/// Pairs that LFW's first line promises: "folds n" has n pairs of each kind in every fold, "n" has one fold.
fn header(first: &[&str]) -> Option<u64> {
    let (folds, each) = match first {
        [each] => (1, number(each)?),
        [folds, each] => (number(folds)?, number(each)?),
        _ => return None,
    };
    folds.checked_mul(each)?.checked_mul(2)
}

fn list_pair(fields: &[&str]) -> Result<([Picture; 2], bool), Broken> {
    let &[a, b, flag] = fields else {
        return Err(Broken::Parts(format!("has {} parts, not 3", fields.len())));
    };
    let same = match flag {
        "1" => true,
        "0" => false,
        other => return Err(Broken::Part(format!("{other:?} is neither 0 nor 1"))),
    };
    if a.is_empty() || b.is_empty() {
        return Err(Broken::Part("a path is empty".into()));
    }
    Ok(([a, b].map(|path| Picture::File(path.into())), same))
}

fn lfw_pair(fields: &[&str]) -> Result<([Picture; 2], bool), Broken> {
    let (pictures, same) = match *fields {
        [name, i, j] => ([(name, i), (name, j)], true),
        [name, i, other, j] => ([(name, i), (other, j)], false),
        _ => {
            let parts = fields.len();
            return Err(Broken::Parts(format!("has {parts} parts, not 3 or 4")));
        }
    };
    for (name, image) in pictures {
        if number(image).is_none() {
            return Err(Broken::Part(format!("{image:?} is no number of an image")));
        }
        // A name is one folder.
        if name.is_empty() || name == ".." || name.contains('/') {
            return Err(Broken::Part(format!("{name:?} is no name of a folder")));
        }
    }
    let stem = |(name, image): (&str, &str)| {
        let image = number(image).unwrap_or(0);
        Picture::Stem(PathBuf::from(name).join(format!("{name}_{image:04}")))
    };
    Ok((pictures.map(stem), same))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn flags(text: &str) -> Vec<bool> {
        parse(text, None).unwrap().iter().map(|pair| pair.same).collect()
    }

    #[test]
    fn lists_may_be_separated_by_tabs_commas_or_blanks() {
        for text in [
            "\u{feff}a b.jpg\tü.png\t1\r\n\r\na b.jpg\td.png\t0\r\n",
            "a b.jpg, ü.png, 1\n\na b.jpg,d.png,0\n",
        ] {
            let pairs = parse(text, None).unwrap();
            assert_eq!(
                pairs[0],
                Pair {
                    line: 1,
                    pictures: ["a b.jpg", "ü.png"].map(|path| Picture::File(path.into())),
                    same: true,
                }
            );
            assert_eq!((pairs[1].line, pairs[1].same), (3, false));
        }
        assert_eq!(flags("a.jpg b.jpg 1\na.jpg  c.jpg 0"), [true, false]);
    }

    #[test]
    fn lfw_names_are_numbered_files() {
        let text = "1\t2\nAbel Pacheco\t1\t12\nJo_Ann\t3\t4\nA\t1\tB\t2\nC\t1\tD\t2\n";
        let pairs = parse(text, None).unwrap();
        assert_eq!(
            pairs[0].pictures,
            ["Abel Pacheco/Abel Pacheco_0001", "Abel Pacheco/Abel Pacheco_0012"]
                .map(|path| Picture::Stem(path.into()))
        );
        assert_eq!(pairs[2].pictures[1], Picture::Stem("B/B_0002".into()));
        assert_eq!(flags(text), [true, true, false, false]);
        // Without a first line of numbers, and without tabs.
        assert_eq!(flags("A 1 2\nA 1 B 2"), [true, false]);
        assert_eq!(flags("A 1 B 2"), [false]);
        assert_eq!(flags("1\nA 1 2\nA 1 B 2"), [true, false]);
        assert!(parse("A 1 1", Some(Layout::List)).unwrap()[0].same);
    }

    #[test]
    fn mistakes_name_their_line() {
        for (text, expected) in [
            ("a\tb\n", "line 1 has 2 parts, not 3"),
            ("a\tb\t1\nc\td\tyes\n", "line 2: \"yes\" is neither 0 nor 1"),
            ("a,,1", "line 1: a path is empty"),
            ("\n", "there are no pairs"),
            (
                "3 4\n",
                "the first line promises 24 pairs, there are 0: the list is cut off",
            ),
            ("1 1\nA 1 2\nA 1 B x\n", "line 3: \"x\" is no number of an image"),
            (
                "1 1\nA 1 2\n../x 1 B 2\n",
                "line 3: \"../x\" is no name of a folder",
            ),
            ("A 1 2\nA\n", "line 2 has 1 parts, not 3 or 4"),
        ] {
            assert_eq!(parse(text, None).unwrap_err(), expected, "{text:?}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_read_or_refused(text in "([a-c/.]{0,3}[\t, ][0-9]{0,2}[\t, ]?[a-c0-9]{0,2}\r?\n?){0,6}", junk: String) {
            for text in [&text, &junk] {
                if let Ok(pairs) = parse(text, None) {
                    prop_assert!(!pairs.is_empty());
                    prop_assert!(pairs.is_sorted_by_key(|pair| pair.line));
                }
            }
        }
    }
}
