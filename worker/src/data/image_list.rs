//! Lists of image files with labels. Three forms, told apart by the first line: `path<TAB>label`; the `.lst` of im2rec,
//! `index<TAB>label[<TAB>label..]<TAB>path`, of which the first label counts; the `.lst` of InsightFace,
//! `aligned<TAB>path<TAB>label[<TAB>box and landmarks]`, of which only aligned faces can be packed. Pure.

use super::image_folder::Entry;
use std::path::{Component, Path, PathBuf};

/// Forms of a list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    PathLabel,
    Im2rec,
    InsightFace,
}

/// The entries of a list, with paths relative to `root`; none may lead out of it. Errors name the line.
pub fn parse(text: &str, root: &Path) -> Result<Vec<Entry>, String> {
    let text = text.trim_start_matches('\u{feff}');
    let mut lines = text
        .lines()
        .zip(1u64..)
        .filter(|(line, _)| !line.trim().is_empty())
        .peekable();
    let Some((first, _)) = lines.peek() else {
        return Err("the list is empty".into());
    };
    let form = form_of(first);
    lines
        .map(|(line, number)| {
            let entry = match form {
                Form::PathLabel => path_label(line),
                Form::Im2rec => im2rec(line),
                Form::InsightFace => insight_face(line),
            };
            entry
                .and_then(|(path, label)| {
                    let path = inside(path, root)?;
                    Ok(Entry { path, label })
                })
                .map_err(|what| format!("line {number}: {what}"))
        })
        .collect()
}

fn form_of(line: &str) -> Form {
    let fields: Vec<&str> = line.split('\t').map(str::trim).collect();
    let is_number = |index: usize| {
        fields
            .get(index)
            .is_some_and(|field| field.parse::<f64>().is_ok())
    };
    match fields.len() {
        0..3 => Form::PathLabel,
        last if is_number(0) && is_number(1) && !is_number(last - 1) => Form::Im2rec,
        _ if is_number(0) && !is_number(1) && is_number(2) => Form::InsightFace,
        _ => Form::PathLabel,
    }
}

fn path_label(line: &str) -> Result<(&str, u32), String> {
    let (path, label) = line
        .rsplit_once('\t')
        .ok_or_else(|| format!("{line:?} is not \"path<TAB>label\""))?;
    match label.trim().parse() {
        Ok(number) => Ok((path.trim(), number)),
        Err(_) => Err(format!("label {label:?} is not a class number")),
    }
}

/// Labels are written as floats there.
fn float_label(text: &str) -> Result<u32, String> {
    match text.trim().parse::<f64>() {
        Ok(label) if (0.0..=f64::from(u32::MAX)).contains(&label) && label.fract() == 0.0 => Ok(label as u32),
        _ => Err(format!("label {text:?} is not a class number")),
    }
}

fn im2rec(line: &str) -> Result<(&str, u32), String> {
    let mut fields = line.split('\t');
    match (fields.next(), fields.next(), fields.next_back()) {
        (Some(_index), Some(label), Some(path)) => Ok((path.trim(), float_label(label)?)),
        _ => Err(format!("{line:?} is not \"index<TAB>label<TAB>path\"")),
    }
}

fn insight_face(line: &str) -> Result<(&str, u32), String> {
    let mut fields = line.split('\t');
    match (fields.next(), fields.next(), fields.next()) {
        (Some(aligned), Some(path), Some(label)) => match aligned.trim() {
            "1" => Ok((path.trim(), float_label(label)?)),
            other => Err(format!(
                "the face is not aligned (the first column is {other}, not 1): cut it out with `data align` first"
            )),
        },
        _ => Err(format!("{line:?} is not \"aligned<TAB>path<TAB>label\"")),
    }
}

/// A path relative to `root`, inside of it.
fn inside(path: &str, root: &Path) -> Result<PathBuf, String> {
    let path = Path::new(path);
    let relative = match path.is_absolute() {
        true => path.strip_prefix(root).unwrap_or(path),
        false => path,
    };
    let stays = relative
        .components()
        .all(|part| matches!(part, Component::Normal(_) | Component::CurDir));
    match stays {
        true => Ok(relative.into()),
        false => Err(format!("{} leaves the folder", path.display())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_form_gives_the_same_entries() {
        let expected = [("a b/1.jpg", 0), ("ü/2.png", 3)].map(|(path, label)| Entry {
            path: path.into(),
            label,
        });
        for text in [
            "\u{feff}a b/1.jpg\t0\r\n\r\nü/2.png\t3\r\n",
            "17\t0.000000\ta b/1.jpg\n4\t3\tü/2.png\n",
            "17\t0\t1.5\t2\ta b/1.jpg\n4\t3\t7\t8\tü/2.png",
            "1\t/data/faces/a b/1.jpg\t0\n1\t/data/faces/ü/2.png\t3\t1\t2\t3\t4\n",
        ] {
            assert_eq!(parse(text, Path::new("/data/faces")).unwrap(), expected, "{text}");
        }
    }

    #[test]
    fn mistakes_name_their_line() {
        for (text, expected) in [
            ("x.jpg\t0\ny.jpg\n", "line 2: \"y.jpg\" is not \"path<TAB>label\""),
            (
                "0\t1\ta.jpg\n1\t0.5\tb.jpg\n",
                "line 2: label \"0.5\" is not a class number",
            ),
            (
                "0\t1\ta.jpg\n1\t-1\tb.jpg\n",
                "line 2: label \"-1\" is not a class number",
            ),
            (
                "0\t1\ta.jpg\n\n1\n",
                "line 3: \"1\" is not \"index<TAB>label<TAB>path\"",
            ),
            (
                "1\ta.jpg\t0\n0\tb.jpg\t0\t1\t2\t3\t4\n",
                "line 2: the face is not aligned",
            ),
            (
                "1\ta.jpg\t0\n1\tb.jpg\n",
                "line 2: \"1\\tb.jpg\" is not \"aligned<TAB>path<TAB>label\"",
            ),
            ("0\t1\t/etc/a.jpg\n", "line 1: /etc/a.jpg leaves the folder"),
            ("0\t1\ta/../../b.jpg\n", "line 1: a/../../b.jpg leaves the folder"),
            (" \n", "the list is empty"),
        ] {
            let error = parse(text, Path::new("/data")).unwrap_err();
            assert!(error.starts_with(expected), "{text:?}: {error}");
        }
    }
}
