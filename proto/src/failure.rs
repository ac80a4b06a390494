//! How a command ends when it cannot do what it was asked: one line that names what was wrong and where, a hint,
//! and an exit code. Both binaries print errors through this module.

use std::{error::Error, fmt};

/// Exit codes of every command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExitCode {
    /// The job or check failed.
    Failed = 1,
    /// The command line or a file that the user wrote is wrong.
    Usage = 2,
    /// What was named does not exist.
    NotFound = 3,
    /// The coordinator cannot be reached or refused.
    Unreachable = 4,
    /// Detached by Ctrl-C; the job goes on.
    Detached = 130,
}

/// An error with what a person can do about it. Put it anywhere in an error chain: [`report`] finds it.
#[derive(Debug)]
pub struct Failure {
    /// Exit code of the process.
    pub code: ExitCode,
    /// What was wrong, where; no full stop.
    pub message: String,
    /// What to do; may be empty.
    pub hint: String,
}

impl Failure {
    /// A failure without a hint.
    pub fn new(code: ExitCode, message: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
            hint: String::new(),
        }
    }

    /// The same with a hint.
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = hint.into();
        self
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl Error for Failure {}

/// Text for standard error (`error: ...`, then `hint: ...` if there is one) and the exit code: those of the first
/// [`Failure`] in the chain, else 1.
pub fn report(error: &(dyn Error + 'static)) -> (String, ExitCode) {
    let mut causes: Vec<String> = Vec::new();
    let mut failure: Option<&Failure> = None;
    let mut next = Some(error);
    while let Some(cause) = next {
        let text = one_line(&cause.to_string());
        // Wrappers often repeat their source's text; say it once.
        if !causes.last().is_some_and(|last| last.ends_with(&text)) {
            causes.push(text);
        }
        failure = failure.or_else(|| cause.downcast_ref());
        next = cause.source();
    }
    let mut text = format!("error: {}", causes.join(": "));
    if let Some(hint) = failure.map(|f| one_line(&f.hint)).filter(|hint| !hint.is_empty()) {
        text.push_str("\nhint: ");
        text.push_str(&hint);
    }
    (text, failure.map_or(ExitCode::Failed, |f| f.code))
}

fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug)]
    struct Outer(Failure);
    impl fmt::Display for Outer {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("read job file")
        }
    }
    impl Error for Outer {
        fn source(&self) -> Option<&(dyn Error + 'static)> {
            Some(&self.0)
        }
    }

    #[test]
    fn a_chain_is_one_line_with_its_hint_and_code() {
        let inner = Failure::new(ExitCode::Usage, "head.scale: 0 is not\n in (0, 80]").hint("64 is usual");
        let (text, code) = report(&Outer(inner));
        assert_eq!(
            text,
            "error: read job file: head.scale: 0 is not in (0, 80]\nhint: 64 is usual"
        );
        assert_eq!(code, ExitCode::Usage);
    }
}
