//! The names of a packed set's identities: `train.identities.tsv` beside `train.rec`, a line `label<TAB>name` for each
//! label in order. Training does not read it; people and the data tools do.

use super::DataError;
use std::{
    collections::HashMap,
    fs, io,
    path::{Path, PathBuf},
};

/// The file beside a `.rec`.
pub fn path_of(rec: &Path) -> PathBuf {
    rec.with_extension("identities.tsv")
}

/// The names beside a `.rec`, by label; nothing where there is no such file. A file that has not `num_classes` names is
/// refused.
pub fn read(rec: &Path, num_classes: u32) -> Result<Option<Vec<String>>, DataError> {
    let path = path_of(rec);
    let text = match fs::read_to_string(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(DataError::io(&path, error)),
    };
    let names = parse(&text).map_err(|message| DataError::format(&path, message))?;
    match names.len() == num_classes as usize {
        true => Ok(Some(names)),
        false => {
            let message = format!(
                "{} names, but {} has {num_classes} identities",
                names.len(),
                rec.display()
            );
            Err(DataError::format(&path, message))
        }
    }
}

/// Refuses names that are not one field of one line. With blanks instead, two persons could have one name.
///
/// # Errors
/// The first of them.
pub fn check(names: &[String]) -> Result<(), String> {
    match names.iter().find(|name| name.contains(['\t', '\n', '\r'])) {
        None => Ok(()),
        Some(name) => Err(format!(
            "the name {name:?} of an identity has a tab or a line end in it"
        )),
    }
}

/// The text of the file.
///
/// # Errors
/// As [`check`].
pub fn format(names: &[String]) -> Result<String, String> {
    check(names)?;
    let lines = names.iter().enumerate();
    Ok(lines.map(|(label, name)| format!("{label}\t{name}\n")).collect())
}

fn parse(text: &str) -> Result<Vec<String>, String> {
    let lines = (0u32..).zip(text.lines());
    lines
        .map(|(label, line)| match line.split_once('\t') {
            Some((number, name)) if number.parse() == Ok(label) && !name.contains('\t') => {
                Ok(name.to_owned())
            }
            _ => Err(format!(
                "line {}: {line:?} is not \"{label}<TAB>name\"",
                label + 1
            )),
        })
        .collect()
}

/// Labels that a list names, a line each: a name, or a label where the set has no names. Lines of the file above,
/// `label<TAB>name`, are labels too. Errors name the line.
pub fn labels(list: &str, num_classes: u32, names: Option<&[String]>) -> Result<Vec<u32>, String> {
    let by_name: Option<HashMap<&str, u32>> =
        names.map(|names| names.iter().map(String::as_str).zip(0u32..).collect());
    let lines = list.trim_start_matches('\u{feff}').lines().zip(1u64..);
    let mut labels = lines
        .filter(|(line, _)| !line.trim().is_empty())
        .map(|(line, number)| {
            let label = match (line.split_once('\t'), &by_name) {
                (Some((label, _)), _) => label.trim().parse().ok(),
                (None, Some(names)) => names.get(line.trim()).copied(),
                (None, None) => line.trim().parse().ok(),
            };
            label
                .filter(|&label| label < num_classes)
                .ok_or_else(|| format!("line {number}: the set has no identity {:?}", line.trim()))
        })
        .collect::<Result<Vec<u32>, _>>()?;
    labels.sort_unstable();
    labels.dedup();
    Ok(labels)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_written_and_read() {
        let dir = tempfile::tempdir().unwrap();
        let rec = dir.path().join("train.rec");
        assert_eq!(read(&rec, 2).unwrap(), None);
        let names = ["Ä b".to_owned(), "c d ".to_owned()];
        fs::write(path_of(&rec), format(&names).unwrap()).unwrap();
        assert_eq!(read(&rec, 2).unwrap().unwrap(), names);
        let error = read(&rec, 3).unwrap_err().to_string();
        assert!(error.contains("train.identities.tsv: 2 names"), "{error}");
        // They became blanks: two folders could share a name, and a list could not tell them apart.
        for name in ["c\td", "c\nd", "c\r"] {
            let error = format(&["a".to_owned(), name.to_owned()]).unwrap_err();
            let expected = format!("the name {name:?} of an identity has a tab or a line end in it");
            assert_eq!(error, expected);
        }
        fs::write(path_of(&rec), "0\ta\n1\tb\tc\n").unwrap();
        let error = read(&rec, 2).unwrap_err().to_string();
        assert!(
            error.ends_with("line 2: \"1\\tb\\tc\" is not \"1<TAB>name\""),
            "{error}"
        );
        fs::write(path_of(&rec), "0\ta\n2\tb\n").unwrap();
        let error = read(&rec, 2).unwrap_err().to_string();
        assert!(
            error.ends_with("line 2: \"2\\tb\" is not \"1<TAB>name\""),
            "{error}"
        );
    }

    #[test]
    fn a_list_has_names_where_there_are_names() {
        let names = ["7".to_owned(), "x y".to_owned()];
        assert_eq!(labels("x y\r\n\n7\n7\n", 2, Some(&names)), Ok(vec![0, 1]));
        assert_eq!(labels("1\tanything\n", 2, Some(&names)), Ok(vec![1]));
        assert_eq!(labels("1\n0\n", 2, None), Ok(vec![0, 1]));
        for (list, names) in [("0\n8\n", Some(&names[..])), ("0\tx\n2\n", None)] {
            let error = labels(list, 2, names).unwrap_err();
            assert!(error.contains("the set has no identity"), "{error}");
        }
        assert_eq!(
            labels("1\nx\n", 2, None).unwrap_err(),
            "line 2: the set has no identity \"x\""
        );
    }
}
