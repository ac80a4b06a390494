//! Recipes of `arcface_torch`, the Python files that this system's job files replace, to job files: reads what they
//! assign, executes nothing, and names all that it could not carry over. Pure: text in, text out.

mod expression;
mod job;
mod lex;
mod script;
mod write;

use crate::spec::{self, JobFile, SpecError};
use std::fmt;

/// A file's name, as people are told of it, and its text.
#[derive(Clone, Copy, Debug)]
pub struct Source<'a> {
    /// Path as typed.
    pub name: &'a str,
    /// Content.
    pub text: &'a str,
}

/// What the recipe's file does not say.
#[derive(Clone, Debug)]
pub struct Options {
    /// Name of the job; the file's name without its ending.
    pub job: String,
    /// Ranks, if given; else those in the job's name (`_32gpus`, `_onegpu`), else 8.
    pub gpus: Option<u32>,
}

/// A recipe as a job file.
#[derive(Clone, Debug)]
pub struct Conversion {
    /// The job file's text.
    pub text: String,
    /// The same, read and found valid.
    pub job: JobFile,
    /// All that was not carried over or means something else here, in the order of the lines.
    pub remarks: Vec<Remark>,
}

/// Something that a person should know about one line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Remark {
    /// The file's name.
    pub file: String,
    /// Line, from 1; `None` for the file as a whole.
    pub line: Option<usize>,
    /// What it is about.
    pub text: String,
    /// What to do; may be empty.
    pub hint: String,
}

impl fmt::Display for Remark {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.line {
            Some(line) => write!(f, "{}:{line}: {}", self.file, self.text),
            None => write!(f, "{}: {}", self.file, self.text),
        }
    }
}

/// Converts a recipe. What it does not set has the value of `base`, else the reference's default.
///
/// # Errors
/// Everything that keeps it from being a job, each with its line: text that is not Python, values out of range.
pub fn convert(
    recipe: Source<'_>,
    base: Option<Source<'_>>,
    options: &Options,
) -> Result<Conversion, Vec<Remark>> {
    let mut layers = Vec::new();
    for source in [Some(recipe), base].into_iter().flatten() {
        let script = script::read(source.text).map_err(|malformed| {
            vec![Remark {
                file: source.name.into(),
                line: Some(malformed.line),
                text: malformed.problem,
                hint: "a recipe is a Python file with lines such as config.lr = 0.1".into(),
            }]
        })?;
        if script.settings.is_empty() {
            return Err(vec![Remark {
                file: source.name.into(),
                line: None,
                text: "no line sets config.KEY".into(),
                hint: "a recipe is a Python file with lines such as config.lr = 0.1".into(),
            }]);
        }
        layers.push(job::Layer {
            file: source.name,
            script,
        });
    }
    let job = job::Job::of(&layers, options);
    let text = job.text();
    match spec::parse(&text, &[]) {
        Ok(parsed) => Ok(Conversion {
            text,
            job: parsed,
            remarks: job.into_remarks(),
        }),
        Err(SpecError::Fields(violations)) => Err(job.complaints(&violations)),
        Err(error) => Err(vec![Remark {
            file: recipe.name.into(),
            line: None,
            text: error.to_string(),
            hint: String::new(),
        }]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tables;
    use proptest::prelude::*;

    fn options(gpus: Option<u32>) -> Options {
        Options {
            job: "r50_case".into(),
            gpus,
        }
    }

    /// The lines of a case are the recipe; those after `base:`, if there is one, are the base file. The output is what
    /// is said and the keys of the job file that are not those of a recipe without any line, or the whole of it for
    /// `show: all`.
    #[test]
    fn recipes_become_job_files() {
        tables::run("recipe/recipes.txt", |lines| {
            let all = lines.first() == Some(&"show: all");
            let lines = &lines[usize::from(all)..];
            let (recipe, base) = match lines.iter().position(|line| *line == "base:") {
                Some(at) => (&lines[..at], Some(lines[at + 1..].join("\n"))),
                None => (lines, None),
            };
            let recipe = recipe.join("\n");
            let source = |name, text| Source { name, text };
            let converted = convert(
                source("r.py", &recipe),
                base.as_deref().map(|text| source("base.py", text)),
                &options(None),
            );
            let say = |remarks: &[Remark]| -> String {
                remarks
                    .iter()
                    .map(|remark| match remark.hint.as_str() {
                        "" => format!("{remark}\n"),
                        hint => format!("{remark}\nhint: {hint}\n"),
                    })
                    .collect()
            };
            match converted {
                // An empty line would end the case.
                Ok(done) if all => format!("{}{}", say(&done.remarks), done.text.replace("\n\n", "\n.\n")),
                Ok(done) => {
                    let usual = convert(
                        source("r.py", "config.rec = '/d'\nconfig.num_epoch = 20"),
                        None,
                        &options(None),
                    )
                    .expect("valid")
                    .text;
                    let differ = done
                        .text
                        .lines()
                        .filter(|line| !line.is_empty() && !usual.lines().any(|other| other == *line))
                        .map(|line| format!("{line}\n"))
                        .collect::<String>();
                    format!("{}{differ}", say(&done.remarks))
                }
                Err(complaints) => format!("refused\n{}", say(&complaints)),
            }
        });
    }

    #[test]
    fn ranks_are_in_the_name_or_given() {
        let ranks = |job: &str, gpus| {
            let text = "config.rec = '/d'\nconfig.num_epoch = 1";
            let options = Options {
                job: job.into(),
                gpus,
            };
            let done = convert(Source { name: "x.py", text }, None, &options).expect("valid");
            (done.job.spec.world_size, done.remarks.len())
        };
        assert_eq!(ranks("wf42m_pfc03_32gpu_r100", None), (32, 0));
        assert_eq!(ranks("wf42m_pfc02_16gpus_r50_bs8k", None), (16, 0));
        assert_eq!(ranks("ms1mv3_r50_onegpu", None), (1, 0));
        assert_eq!(ranks("ms1mv3_r50", None), (8, 1));
        assert_eq!(ranks("ms1mv3_0gpus", None), (8, 1));
        assert_eq!(ranks("wf42m_pfc03_32gpu_r100", Some(4)), (4, 0));
    }

    fn check(text: &str) {
        let base = Some(Source { name: "b.py", text });
        for base in [None, base] {
            let source = Source { name: "a.py", text };
            let remarks = match convert(source, base, &options(None)) {
                Ok(done) => done.remarks,
                Err(complaints) => {
                    assert!(!complaints.is_empty());
                    complaints
                }
            };
            for remark in remarks {
                assert!(!remark.to_string().contains('\n'), "{remark:?}");
            }
        }
    }

    proptest! {
        #[test]
        fn no_text_makes_it_panic(text in "\\PC*|(?s).{0,200}") {
            check(&text);
        }

        /// Pieces of Python in any order reach further than any characters do.
        #[test]
        fn no_python_makes_it_panic(pieces in prop::collection::vec(prop::sample::select(vec![
            "config", ".", "lr", "rec", "num_epoch", "margin_list", "sample_rate", "[", "]", "(", ")", "{", "}", "'x'",
            "\"\"\"", "=", "+=", "**", "//", "%", "-", "not ", "if ", " else ", "elif ", "else", ":", "\n", "\n  ", "\n\t",
            ";", ",", "1", "0", "-9223372036854775807", "1e308", "0x", "f'", "\\", "#", " in ", " is ", "def ", "lambda ",
            "for ", "None", "True", "\u{feff}", "\r", "é", "config.rec = '/d'\n", "config.num_epoch = 1\n",
        ]), 0..60)) {
            check(&pieces.concat());
        }

        /// Whatever numbers a recipe has, the job file says the same ones.
        #[test]
        fn numbers_survive(lr in 1e-9f64..1e9, classes in 1u32.., image in 1u32.., rate in 1e-9f64..1.0) {
            let text = format!(
                "config.rec = '/d'\nconfig.num_epoch = 1\nconfig.lr = {lr:?}\nconfig.num_classes = {classes}\n\
                 config.num_image = {image}\nconfig.sample_rate = {rate:?}"
            );
            let job = convert(Source { name: "a.py", text: &text }, None, &options(None)).expect("valid").job.spec;
            prop_assert_eq!((job.train.lr, job.head.sample_rate), (lr, rate));
            prop_assert_eq!((job.head.num_classes, job.data.num_image), (Some(classes), Some(image.into())));
        }
    }
}
