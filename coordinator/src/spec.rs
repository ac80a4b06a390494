//! Job file text and `--set` overrides to a valid job. Everything that is wrong is found in one pass: unknown keys,
//! wrong types and values out of range, each with its path and a hint. Pure: reads no file, prints nothing; the
//! ranges themselves are in `arcface_proto::convert`.

mod schema;

use arcface_proto::convert::{self, FieldViolation, nearest};
use arcface_proto::{spec::JobSpec, v1};
pub use schema::Kind;
use serde::Deserialize;
use toml::{Table, Value};

/// A job file that was read and found valid.
#[derive(Clone, Debug)]
pub struct JobFile {
    /// As written, overrides applied: what `SubmitJob` takes.
    pub wire: v1::JobSpec,
    /// The same with every default filled in.
    pub spec: JobSpec,
}

/// Why a job file is not a job.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SpecError {
    /// Not TOML.
    #[error("line {line}, column {column}: {message}")]
    Syntax {
        /// Line, from 1.
        line: usize,
        /// Column in characters, from 1.
        column: usize,
        /// What the parser expected.
        message: String,
    },
    /// An override that is not `key=value`.
    #[error("--set {text:?} is not section.key=value")]
    Override {
        /// As typed.
        text: String,
    },
    /// Keys and values that do not make a job.
    #[error("{} bad fields", .0.len())]
    Fields(Vec<FieldViolation>),
}

/// Reads a job file and applies overrides (`head.sample_rate=0.1`) in their order. An override's value is read as
/// TOML; what is not TOML is a string, so that `data.rec=/faces` needs no quotes.
///
/// # Errors
/// See [`SpecError`]; bad fields are reported all at once.
pub fn parse(text: &str, overrides: &[String]) -> Result<JobFile, SpecError> {
    let mut table: Table = toml::from_str(text).map_err(|error| syntax_error(text, &error))?;
    for text in overrides {
        apply_override(&mut table, text)?;
    }
    let shape = Kind::of::<v1::JobSpec>();
    let mut shape_check = ShapeCheck {
        root: &shape,
        violations: Vec::new(),
        implied: Vec::new(),
    };
    shape_check.table("", &shape, &mut table);
    let ShapeCheck {
        mut violations,
        implied,
        ..
    } = shape_check;
    // Only keys of the right type are left, so this fails on nothing; if it does, it says what.
    let wire = v1::JobSpec::deserialize(Value::Table(table)).map_err(|error| {
        SpecError::Fields(vec![FieldViolation {
            path: "job file".into(),
            problem: error.message().into(),
            hint: String::new(),
        }])
    })?;
    match convert::job_spec(&wire) {
        Ok(spec) if violations.is_empty() => return Ok(JobFile { wire, spec }),
        Ok(_) => {}
        Err(ranges) => {
            let follows = |v: &FieldViolation| {
                let misspelt =
                    v.problem == "is missing" && implied.iter().any(|meant| follows_from(&v.path, meant));
                misspelt || violations.iter().any(|bad| follows_from(&v.path, &bad.path))
            };
            let own: Vec<_> = ranges.into_iter().filter(|v| !follows(v)).collect();
            violations.extend(own);
        }
    }
    violations.sort_by_key(|v| {
        let section = v.path.split(['.', '[']).next().unwrap_or_default();
        shape.keys().iter().position(|(name, _)| *name == section)
    });
    Err(SpecError::Fields(violations))
}

/// True if a complaint about `path` only repeats one about `bad`: the same key, a key of a section that was
/// misspelt, an element of a bad list, or a bound that is itself in doubt.
fn follows_from(path: &str, bad: &str) -> bool {
    let within = path
        .strip_prefix(bad)
        .is_some_and(|rest| rest.is_empty() || rest.starts_with(['.', '[']));
    let element = bad.strip_prefix(path).is_some_and(|rest| rest.starts_with('['));
    let bound = bad == "job.world_size" && ["job.min_world_size", "job.max_world_size"].contains(&path);
    within || element || bound
}

/// Whether a text is a whole number, whatever its size.
fn is_whole(text: &str) -> bool {
    let digits = text.strip_prefix(['+', '-']).unwrap_or(text);
    !digits.is_empty() && digits.chars().all(|c| c.is_ascii_digit() || c == '_')
}

fn syntax_error(text: &str, error: &toml::de::Error) -> SpecError {
    let at = error.span().map_or(0, |span| span.start).min(text.len());
    let value = error.span().and_then(|span| text.get(span)).unwrap_or_default();
    let before = &text.as_bytes()[..at];
    let line_start = before
        .iter()
        .rposition(|b| *b == b'\n')
        .map_or(0, |newline| newline + 1);
    SpecError::Syntax {
        line: 1 + before.iter().filter(|b| **b == b'\n').count(),
        column: 1 + String::from_utf8_lossy(&before[line_start..]).chars().count(),
        // The parser speaks of types of ours.
        message: match is_whole(value) {
            true => format!(
                "{value} does not fit: whole numbers go from {} to {}",
                i64::MIN,
                i64::MAX
            ),
            false => error.message().to_owned(),
        },
    }
}

fn apply_override(table: &mut Table, text: &str) -> Result<(), SpecError> {
    let malformed = || SpecError::Override { text: text.into() };
    let (path, value) = text.split_once('=').ok_or_else(malformed)?;
    let (path, value) = (path.trim(), value.trim());
    let (sections, key) = path
        .rsplit_once('.')
        .map_or((None, path), |(sections, key)| (Some(sections), key));
    if path.split('.').any(str::is_empty) {
        return Err(malformed());
    }
    let mut target = table;
    for section in sections.iter().flat_map(|sections| sections.split('.')) {
        let entry = target
            .entry(section)
            .or_insert_with(|| Value::Table(Table::new()));
        if !entry.is_table() {
            *entry = Value::Table(Table::new());
        }
        target = entry.as_table_mut().ok_or_else(malformed)?;
    }
    target.insert(key.into(), override_value(value));
    Ok(())
}

/// The value as TOML if it is exactly one TOML value, else as a string.
fn override_value(text: &str) -> Value {
    let bare = || Value::String(text.into());
    let Ok(mut table) = toml::from_str::<Table>(&format!("value = {text}")) else {
        return bare();
    };
    match (table.len(), table.remove("value")) {
        (1, Some(Value::Datetime(_))) | (_, None) => bare(),
        (1, Some(value)) => value,
        _ => bare(),
    }
}

/// Compares a file with the shape of a job, and takes out what does not fit.
struct ShapeCheck<'a> {
    root: &'a Kind,
    violations: Vec<FieldViolation>,
    /// Paths that unknown keys were probably meant as: that they are missing is not worth a second line.
    implied: Vec<String>,
}

impl ShapeCheck<'_> {
    fn table(&mut self, path: &str, shape: &Kind, table: &mut Table) {
        let unknown: Vec<_> = table
            .keys()
            .filter(|key| shape.get(key).is_none())
            .cloned()
            .collect();
        for key in unknown {
            table.remove(&key);
            self.unknown(path, shape, &key);
        }
        for (key, kind) in shape.keys() {
            let Some(value) = table.get_mut(*key) else {
                continue;
            };
            let path = join(path, key);
            if !self.value(&path, kind, value) {
                table.remove(*key);
            }
        }
    }

    /// True if the value can stay.
    fn value(&mut self, path: &str, kind: &Kind, value: &mut Value) -> bool {
        let fits = match (kind, &mut *value) {
            (Kind::Text, Value::String(_)) | (Kind::Bool, Value::Boolean(_)) => true,
            (Kind::Number, Value::Integer(_) | Value::Float(_)) => true,
            (Kind::Whole(max), Value::Integer(number)) => u64::try_from(*number).is_ok_and(|n| n <= *max),
            (Kind::Table(_), Value::Table(table)) => {
                self.table(path, kind, table);
                true
            }
            (Kind::List(of), Value::Array(values)) => {
                let before = self.violations.len();
                for (i, value) in values.iter_mut().enumerate() {
                    self.value(&format!("{path}[{i}]"), of, value);
                }
                return self.violations.len() == before;
            }
            _ => false,
        };
        if !fits {
            self.violations.push(FieldViolation {
                path: path.into(),
                problem: format!("{} is not {}", shown(value), kind.describe()),
                hint: type_hint(kind, value),
            });
        }
        fits
    }

    fn unknown(&mut self, path: &str, shape: &Kind, key: &str) {
        let names = |kind: &Kind| kind.keys().iter().map(|(name, _)| *name).collect::<Vec<_>>();
        let here = names(shape);
        let elsewhere = self
            .root
            .keys()
            .iter()
            .find(|(_, section)| section.get(key).is_some());
        let (meant, hint) = if let Some((section, _)) = elsewhere {
            (Some(join(section, key)), format!("it belongs in [{section}]"))
        } else if self.root.get(key).is_some() {
            (
                Some(key.to_owned()),
                "it belongs at the top of the file, before the first [section]".into(),
            )
        } else if let Some(near) = nearest(key, here.iter().copied()) {
            let is_section = !shape.get(near).map_or(&[][..], Kind::keys).is_empty();
            let shown = if is_section {
                format!("[{near}]")
            } else {
                format!("{near:?}")
            };
            (Some(join(path, near)), format!("did you mean {shown}?"))
        } else if let Some((section, near)) = self
            .root
            .keys()
            .iter()
            .find_map(|(section, kind)| nearest(key, names(kind)).map(|near| (section, near)))
        {
            (None, format!("did you mean {near:?} in [{section}]?"))
        } else {
            let place = if path.is_empty() {
                "a job file".into()
            } else {
                format!("[{path}]")
            };
            (None, format!("{place} has {}", here.join(", ")))
        };
        self.implied.extend(meant);
        let at_root = path.is_empty();
        self.violations.push(FieldViolation {
            path: join(path, &shown_key(key)),
            problem: if at_root {
                "unknown section or key".into()
            } else {
                "unknown key".into()
            },
            hint,
        });
    }
}

fn join(path: &str, key: &str) -> String {
    if path.is_empty() {
        key.to_owned()
    } else {
        format!("{path}.{key}")
    }
}

/// A key as TOML writes it, short.
fn shown_key(key: &str) -> String {
    let bare = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
    let quoted = key.is_empty() || !key.chars().all(bare);
    let short: String = key.chars().take(64).collect();
    if quoted { format!("{short:?}") } else { short }
}

/// A value as TOML writes it, on one line and short.
fn shown(value: &Value) -> String {
    const LONGEST: usize = 60;
    let text = value.to_string().split_whitespace().collect::<Vec<_>>().join(" ");
    match text.char_indices().nth(LONGEST) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text,
    }
}

fn type_hint(kind: &Kind, value: &Value) -> String {
    match (kind, value) {
        (Kind::Text, Value::Table(_) | Value::Array(_)) => String::new(),
        (Kind::Text, _) => "write it in quotes".into(),
        (Kind::Whole(_) | Kind::Number | Kind::Bool, Value::String(text))
            if toml::from_str::<Table>(&format!("value = {text}")).is_ok() =>
        {
            "write it without quotes".into()
        }
        (Kind::Whole(_), Value::String(text)) if is_whole(text) => {
            format!("the largest number of a job file is {}", i64::MAX)
        }
        (Kind::List(_), _) => "write it in brackets: [a, b]".into(),
        (Kind::Table(_), _) => "write its keys under a [section] line".into(),
        _ => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{fs, path::Path};

    const SMALLEST: &str = "output = \"o/x\"\n[model]\nnetwork = \"r18\"\n[data]\nrec = \"/d\"\n";

    fn set(overrides: &[&str]) -> Result<JobFile, SpecError> {
        parse(
            SMALLEST,
            &overrides.iter().map(|o| (*o).to_owned()).collect::<Vec<_>>(),
        )
    }

    #[test]
    fn overrides_are_toml_or_bare_words() {
        let spec = set(&[
            "head.sample_rate=0.1",
            "data.rec=/my faces/a=b",
            "eval.val_targets=[\"lfw\", \"cfp_fp\"]",
            "train.lr = 1",
            "job.name=2026-11-24",
            "model.freeze_batch_norm=true",
            "output=\"o/y\"",
        ])
        .expect("valid")
        .spec;
        assert_eq!((spec.head.sample_rate, spec.train.lr), (0.1, 1.0));
        assert_eq!(
            (spec.data.rec.as_str(), spec.output.as_str()),
            ("/my faces/a=b", "o/y")
        );
        assert_eq!(spec.eval.val_targets, ["lfw", "cfp_fp"]);
        assert_eq!(
            (spec.name.as_str(), spec.model.freeze_batch_norm),
            ("2026-11-24", true)
        );
    }

    #[test]
    fn the_last_override_wins() {
        assert_eq!(
            set(&["train.lr=1", "train.lr=2"]).expect("valid").spec.train.lr,
            2.0
        );
    }

    #[test]
    fn an_override_cannot_smuggle_in_a_second_key() {
        let name = set(&["job.name=1\nseed=3"]).expect("a string").spec.name;
        assert_eq!(name, "1\nseed=3");
    }

    #[test]
    fn malformed_overrides_are_quoted_back() {
        for text in ["head.sample_rate", "=1", "head.=1", ".lr=1", "a..b=1"] {
            assert_eq!(
                set(&[text]).err(),
                Some(SpecError::Override { text: text.into() }),
                "{text}"
            );
        }
    }

    /// Each `testdata/spec/NAME.toml` gives exactly the lines of `NAME.expected`. Overrides are in comments
    /// `# --set KEY=VALUE`. `UPDATE_EXPECT=1` rewrites the expected files.
    #[test]
    fn bad_job_files_say_everything_that_is_wrong() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata/spec");
        let mut cases = 0;
        for entry in fs::read_dir(&folder).expect("testdata") {
            let path = entry.expect("entry").path();
            if path.extension().is_none_or(|e| e != "toml") {
                continue;
            }
            cases += 1;
            let text = fs::read_to_string(&path).expect("case");
            let overrides: Vec<_> = text
                .lines()
                .filter_map(|l| l.strip_prefix("# --set "))
                .map(str::to_owned)
                .collect();
            let lines = match parse(&text, &overrides) {
                Ok(_) => "valid\n".to_owned(),
                Err(SpecError::Fields(violations)) => violations
                    .iter()
                    .map(|v| match v.hint.as_str() {
                        "" => format!("{v}\n"),
                        hint => format!("{v}\nhint: {hint}\n"),
                    })
                    .collect(),
                Err(other) => format!("{other}\n"),
            };
            let expected = path.with_extension("expected");
            if std::env::var_os("UPDATE_EXPECT").is_some() {
                fs::write(&expected, &lines).expect("write expected");
            }
            assert_eq!(
                lines,
                fs::read_to_string(&expected).expect("expected"),
                "{}",
                path.display()
            );
        }
        assert!(cases >= 8, "only {cases} cases in {}", folder.display());
    }
}
