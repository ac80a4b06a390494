//! Table tests in text files. A case is a comment that says what it shows, input lines, `----`, and the expected
//! output; cases are separated by empty lines. `UPDATE_EXPECT=1` rewrites the outputs, to be reviewed as a diff.

use std::{env, fs, path::Path};

/// Runs every case of `testdata/FILE`: `case` gets the input lines and returns the output.
pub fn run(file: &str, case: impl Fn(&[&str]) -> String) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata").join(file);
    let text = fs::read_to_string(&path).unwrap_or_else(|e| panic!("read {}: {e}", path.display()));
    let mut rewritten = Vec::new();
    let mut failures = Vec::new();
    for block in text
        .split("\n\n")
        .map(str::trim)
        .filter(|block| !block.is_empty())
    {
        let (input, expected) = block.split_once("\n----").unwrap_or((block, ""));
        let lines: Vec<&str> = input.lines().filter(|line| !line.starts_with('#')).collect();
        let got = case(&lines);
        if got.trim() != expected.trim() {
            failures.push(format!(
                "{input}\nexpected:\n{}\ngot:\n{}\n",
                expected.trim(),
                got.trim()
            ));
        }
        rewritten.push(format!("{input}\n----\n{}\n", got.trim()));
    }
    assert!(!rewritten.is_empty(), "{} has no cases", path.display());
    if env::var_os("UPDATE_EXPECT").is_some() {
        fs::write(&path, rewritten.join("\n")).expect("rewrite the table");
    } else {
        assert!(
            failures.is_empty(),
            "{}:\n\n{}",
            path.display(),
            failures.join("\n")
        );
    }
}
