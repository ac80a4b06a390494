//! What a recipe's statements set, as far as that follows from reading them: assignments to `config.KEY` and to
//! plain names, and `if` chains whose conditions have values. Loops, calls and functions are named and left out; what
//! they might have set counts as unknown, never as what it was before.

use super::expression::{self, Names, Value, Why, evaluate, key_after};
use super::lex::{self, Line, Malformed, Placed, Token};
use std::collections::BTreeMap;

/// Blocks inside each other.
const DEEPEST: usize = 20;
/// Characters of source text that are quoted.
const QUOTED: usize = 60;
/// The object that a recipe fills.
const CONFIG: &str = "config";

/// What a key was set to last.
#[derive(Clone, Debug, PartialEq)]
pub struct Setting {
    /// Line, from 1.
    pub line: usize,
    /// The value, or why there is none.
    pub value: Result<Value, Why>,
    /// The expression as it stands in the source, on one line and short.
    pub text: String,
}

/// A statement that was left out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LeftOut {
    /// Line, from 1.
    pub line: usize,
    /// What was left out and why.
    pub text: String,
}

/// A script, read to its end.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Script {
    /// Keys of `config`.
    pub settings: BTreeMap<String, Setting>,
    /// By line.
    pub left_out: Vec<LeftOut>,
}

/// Reads a script.
///
/// # Errors
/// [`Malformed`] if it is not Python: quotes, brackets, indentation.
pub fn read(source: &str) -> Result<Script, Malformed> {
    let lines = lex::lines(source)?;
    let mut walk = Walk {
        source,
        script: Script::default(),
        variables: BTreeMap::new(),
    };
    // A recipe is imported, never run by itself.
    let imported = Value::Text("recipe".into());
    walk.variables.insert("__name__".into(), Ok(imported));
    let end = walk.block(&lines, 0, Mode::Run, 0)?;
    match lines.get(end) {
        None => Ok(walk.script),
        Some(line) => Err(indentation(line)),
    }
}

/// What becomes of statements.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    /// They are executed.
    Run,
    /// They are known not to be.
    Dead,
    /// Nobody knows: what they set is unknown.
    Unknown,
}

struct Walk<'a> {
    source: &'a str,
    script: Script,
    variables: BTreeMap<String, Result<Value, Why>>,
}

impl Names for Walk<'_> {
    fn variable(&self, name: &str) -> Result<Value, Why> {
        self.variables
            .get(name)
            .cloned()
            .unwrap_or_else(|| Err(format!("{name:?} has no value")))
    }

    fn setting(&self, object: &str, key: &str) -> Option<Result<Value, Why>> {
        (object == CONFIG).then(|| match self.script.settings.get(key) {
            Some(setting) => setting
                .value
                .clone()
                .map_err(|_| format!("config.{key} is not evaluated")),
            None => Err(format!("config.{key} is not set")),
        })
    }
}

impl Walk<'_> {
    /// Reads the lines of one block from `at` on; the index of the first that is not in it.
    fn block(&mut self, lines: &[Line], mut at: usize, mode: Mode, depth: usize) -> Result<usize, Malformed> {
        let Some(indent) = lines.get(at).map(|line| line.indent) else {
            return Ok(at);
        };
        if depth == 0 && indent > 0 {
            return Err(indentation(&lines[at]));
        }
        while let Some(line) = lines.get(at).filter(|line| line.indent >= indent) {
            if line.indent > indent {
                return Err(indentation(line));
            }
            at = match compound(&line.tokens) {
                Some(Compound::If) => self.branches(lines, at, mode, depth)?,
                Some(kind) => {
                    let inner = self.announce(kind, line, mode);
                    self.body(lines, at, inner, depth)?
                }
                None => {
                    self.simple(line.number, &line.tokens, mode);
                    at + 1
                }
            };
        }
        Ok(at)
    }

    /// The body of the compound statement at `at`: on its line, or the deeper lines after it.
    fn body(&mut self, lines: &[Line], at: usize, mode: Mode, depth: usize) -> Result<usize, Malformed> {
        let head = &lines[at];
        let malformed = |problem: String| Malformed {
            line: head.number,
            problem,
        };
        let Some(colon) = position(&head.tokens, ":") else {
            return Err(malformed("a colon is missing".into()));
        };
        let inline = &head.tokens[colon + 1..];
        if !inline.is_empty() {
            self.simple(head.number, inline, mode);
            return Ok(at + 1);
        }
        if depth >= DEEPEST {
            return Err(malformed(format!("more than {DEEPEST} blocks inside each other")));
        }
        match lines.get(at + 1) {
            Some(next) if next.indent > head.indent => self.block(lines, at + 1, mode, depth + 1),
            _ => Err(malformed("the lines that belong to it are missing".into())),
        }
    }

    /// `if`, `elif` and `else`: at most one body is executed.
    fn branches(
        &mut self,
        lines: &[Line],
        mut at: usize,
        mode: Mode,
        depth: usize,
    ) -> Result<usize, Malformed> {
        let indent = lines[at].indent;
        // What becomes of the branches still to come.
        let mut open = mode;
        loop {
            let line = &lines[at];
            let condition = &line.tokens[1..position(&line.tokens, ":").unwrap_or(line.tokens.len())];
            let is_else = is_word(&line.tokens, "else");
            let taken = match open {
                Mode::Run if is_else => Mode::Run,
                Mode::Run => match evaluate(condition, self) {
                    Ok(value) if value.is_true() => {
                        open = Mode::Dead;
                        Mode::Run
                    }
                    Ok(_) => Mode::Dead,
                    Err(why) => {
                        let quoted = self.quote(condition);
                        self.leave_out(
                            line.number,
                            format!("the condition {quoted} is not evaluated ({why}), no branch is taken"),
                        );
                        open = Mode::Unknown;
                        Mode::Unknown
                    }
                },
                closed => closed,
            };
            at = self.body(lines, at, taken, depth)?;
            let goes_on = lines.get(at).is_some_and(|next| {
                next.indent == indent
                    && !is_else
                    && (is_word(&next.tokens, "elif") || is_word(&next.tokens, "else"))
            });
            if !goes_on {
                return Ok(at);
            }
        }
    }

    /// Names a compound statement that is not executed; what becomes of its body.
    fn announce(&mut self, kind: Compound, line: &Line, mode: Mode) -> Mode {
        if mode == Mode::Dead {
            return Mode::Dead;
        }
        let name = match line.tokens.get(1).map(|placed| &placed.token) {
            Some(Token::Name(name)) => name.clone(),
            _ => String::new(),
        };
        match kind {
            Compound::Definition => {
                self.variables.remove(&name);
                self.leave_out(
                    line.number,
                    format!("{name}: functions and classes are not carried over"),
                );
                Mode::Dead
            }
            Compound::If | Compound::Other => {
                let head = self.quote(&line.tokens[..1]);
                self.leave_out(line.number, format!("{head}: such a block is not executed"));
                Mode::Unknown
            }
        }
    }

    /// Statements without a body, separated by semicolons.
    fn simple(&mut self, line: usize, tokens: &[Placed], mode: Mode) {
        if mode == Mode::Dead {
            return;
        }
        for statement in split(tokens, ";")
            .into_iter()
            .filter(|statement| !statement.is_empty())
        {
            self.statement(line, statement, mode);
        }
    }

    fn statement(&mut self, line: usize, statement: &[Placed], mode: Mode) {
        let only_text = statement
            .iter()
            .all(|placed| matches!(placed.token, Token::Text(_)));
        if only_text || is_word(statement, "pass") {
            return;
        }
        if is_word(statement, "import") || is_word(statement, "from") {
            if statement
                .iter()
                .any(|placed| placed.token == Token::Name(CONFIG.into()))
            {
                self.leave_out(
                    line,
                    "the import of another recipe is not followed: give its file with --base".into(),
                );
            }
            return;
        }
        let parts = split(statement, "=");
        let (targets, value) = match parts.split_last() {
            Some((value, targets)) if !targets.is_empty() => (targets, *value),
            _ => return self.other(line, statement, mode),
        };
        let evaluated = match mode {
            Mode::Unknown => Err("it stands in a block that is not executed".to_owned()),
            _ => evaluate(value, self),
        };
        for target in targets {
            // Without an annotation.
            let target = &target[..position(target, ":").unwrap_or(target.len())];
            self.assign(line, target, evaluated.clone(), value);
        }
    }

    /// `x += 1`, or anything else.
    fn other(&mut self, line: usize, statement: &[Placed], mode: Mode) {
        let augmented = statement
            .iter()
            .enumerate()
            .find_map(|(at, placed)| match placed.token {
                Token::Sign(sign) => ["+=", "-=", "*=", "/=", "//=", "%=", "**="]
                    .contains(&sign)
                    .then(|| (at, sign.trim_end_matches('='))),
                _ => None,
            });
        if let Some((at, operator)) = augmented {
            let (target, value) = (&statement[..at], &statement[at + 1..]);
            let result = match mode {
                Mode::Unknown => Err("it stands in a block that is not executed".to_owned()),
                _ => evaluate(target, self)
                    .and_then(|before| expression::apply(operator, &before, &evaluate(value, self)?)),
            };
            return self.assign(line, target, result, value);
        }
        // What is in a call's brackets may be a password.
        let shown = position(statement, "(").unwrap_or(statement.len());
        let quoted = self.quote(&statement[..shown.max(1)]);
        self.leave_out(line, format!("{quoted}: such a statement is not executed"));
    }

    fn assign(&mut self, line: usize, target: &[Placed], value: Result<Value, Why>, text: &[Placed]) {
        match target {
            [
                Placed {
                    token: Token::Name(name),
                    ..
                },
            ] if name == CONFIG => self.begin(line, text),
            [
                Placed {
                    token: Token::Name(name),
                    ..
                },
            ] => {
                let value = value.map_err(|_| format!("{name:?} is not evaluated in line {line}"));
                self.variables.insert(name.clone(), value);
            }
            [
                Placed {
                    token: Token::Name(name),
                    ..
                },
                rest @ ..,
            ] if name == CONFIG && key_after(rest).is_some_and(|(_, length)| length == rest.len()) => {
                if let Some((key, _)) = key_after(rest) {
                    let text = self.quote(text);
                    self.script
                        .settings
                        .insert(key.to_owned(), Setting { line, value, text });
                }
            }
            _ => self.assign_in_part(line, target),
        }
    }

    /// `config = edict()` begins the recipe anew.
    fn begin(&mut self, line: usize, text: &[Placed]) {
        let empty = matches!(
            text.iter().map(|placed| &placed.token).collect::<Vec<_>>()[..],
            [Token::Name(_), Token::Sign("("), Token::Sign(")")] | [Token::Sign("{"), Token::Sign("}")]
        );
        if !empty {
            self.leave_out(
                line,
                "config: only what is assigned to config.KEY after this line is carried over".into(),
            );
        }
        self.script.settings.clear();
    }

    /// Targets such as `a, config.b` or `config.a.b`: whatever they name has no value from here on.
    fn assign_in_part(&mut self, line: usize, target: &[Placed]) {
        let text = self.quote(target);
        let why = || format!("the assignment to {text} in line {line} is not evaluated");
        for (at, placed) in target.iter().enumerate() {
            let Token::Name(name) = &placed.token else {
                continue;
            };
            if let Some((key, _)) = key_after(&target[at + 1..]).filter(|_| name == CONFIG) {
                let unknown = Setting {
                    line,
                    value: Err(why()),
                    text: "...".into(),
                };
                self.script.settings.insert(key.to_owned(), unknown);
            } else if let Some(value) = self.variables.get_mut(name) {
                *value = Err(why());
            }
        }
        self.leave_out(line, format!("{text}: such an assignment is not carried over"));
    }

    fn leave_out(&mut self, line: usize, text: String) {
        self.script.left_out.push(LeftOut { line, text });
    }

    fn quote(&self, tokens: &[Placed]) -> String {
        match (tokens.first(), tokens.last()) {
            (Some(first), Some(last)) => short(&self.source[first.start..last.end]),
            _ => String::new(),
        }
    }
}

/// Source text on one line, without control characters, short.
fn short(text: &str) -> String {
    let line: String = text
        .split_whitespace()
        .collect::<Vec<_>>()
        .join(" ")
        .chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect();
    match line.char_indices().nth(QUOTED) {
        Some((end, _)) => format!("{}...", &line[..end]),
        None => line,
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Compound {
    If,
    Definition,
    Other,
}

/// The kind of compound statement that a line begins, if it does.
fn compound(tokens: &[Placed]) -> Option<Compound> {
    let Token::Name(word) = &tokens.first()?.token else {
        return None;
    };
    match word.as_str() {
        "if" => Some(Compound::If),
        "def" | "class" => Some(Compound::Definition),
        "for" | "while" | "with" | "try" | "except" | "finally" | "elif" | "else" | "async" => {
            Some(Compound::Other)
        }
        _ => (tokens.last()?.token == Token::Sign(":")).then_some(Compound::Other),
    }
}

fn is_word(tokens: &[Placed], word: &str) -> bool {
    matches!(tokens.first().map(|placed| &placed.token), Some(Token::Name(name)) if name == word)
}

/// Where a sign stands first outside of brackets. An opening bracket stands outside of itself.
fn position(tokens: &[Placed], wanted: &str) -> Option<usize> {
    let mut depth = 0usize;
    tokens.iter().position(|placed| {
        let Token::Sign(sign) = placed.token else {
            return false;
        };
        let found = depth == 0 && sign == wanted;
        match sign {
            "(" | "[" | "{" => depth += 1,
            ")" | "]" | "}" => depth = depth.saturating_sub(1),
            _ => {}
        }
        found
    })
}

/// The parts between a sign, outside of brackets.
fn split<'a>(mut tokens: &'a [Placed], sign: &str) -> Vec<&'a [Placed]> {
    let mut parts = Vec::new();
    while let Some(at) = position(tokens, sign) {
        parts.push(&tokens[..at]);
        tokens = &tokens[at + 1..];
    }
    parts.push(tokens);
    parts
}

fn indentation(line: &Line) -> Malformed {
    Malformed {
        line: line.number,
        problem: "the line is indented unlike those around it".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(source: &str) -> Vec<String> {
        let script = match read(source) {
            Ok(script) => script,
            Err(malformed) => return vec![format!("{}: {}", malformed.line, malformed.problem)],
        };
        let settings = script.settings.iter().map(|(key, setting)| match &setting.value {
            Ok(value) => format!("{key} = {value}"),
            Err(why) => format!("{key} = ? {why}"),
        });
        let left_out = script
            .left_out
            .iter()
            .map(|left| format!("{}: {}", left.line, left.text));
        settings.chain(left_out).collect()
    }

    #[test]
    fn assignments_have_their_last_value() {
        let source = "config = edict()\nconfig.lr = 1\nrate = 2; config.lr = rate\nconfig['a'] = config.b = config.lr * 3\n\
                      config.a += 1\nconfig.c: float = 2.5\n'''text'''\npass\nimport os\n";
        assert_eq!(shown(source), ["a = 7", "b = 6", "c = 2.5", "lr = 2"]);
    }

    #[test]
    fn the_first_true_branch_is_executed() {
        let source = "config.d = 'b'\nif config.d == 'a':\n    config.x = 1\nelif config.d == 'b':\n    if True: config.x = 2\n\
                      elif unknown():\n    config.x = 3\nelse:\n    config.x = 4\nif __name__ == '__main__':\n  config.x = 5\n";
        assert_eq!(shown(source), ["d = \"b\"", "x = 2"]);
    }

    #[test]
    fn what_may_have_been_set_is_unknown() {
        let source = "config.x = 1\nconfig.y = 1\nn = 1\nif f():\n  config.x = 2\n  n = 2\nelse:\n  for i in n:\n    config.y = i\n\
                      config.z = n\nconfig.w = config.x\na, config.v = 1, 2\nconfig.u.v = 3\n";
        assert_eq!(
            shown(source),
            [
                "u = ? the assignment to config.u.v in line 13 is not evaluated",
                "v = ? the assignment to a, config.v in line 12 is not evaluated",
                "w = ? config.x is not evaluated",
                "x = ? it stands in a block that is not executed",
                "y = ? it stands in a block that is not executed",
                "z = ? \"n\" is not evaluated in line 6",
                "4: the condition f() is not evaluated (it calls a function), no branch is taken",
                "8: for: such a block is not executed",
                "12: a, config.v: such an assignment is not carried over",
                "13: config.u.v: such an assignment is not carried over",
            ]
        );
    }

    #[test]
    fn functions_are_not_executed_and_arguments_not_shown() {
        let source = "def step(epoch):\n    config.x = 1\n    return 2\nconfig.f = step\nwandb.login(key='secret')\n\
                      os.environ['A'] = 'secret'\nfrom configs.base import config\n";
        assert_eq!(
            shown(source),
            [
                "f = ? \"step\" has no value",
                "1: step: functions and classes are not carried over",
                "5: wandb.login: such a statement is not executed",
                "6: os.environ['A']: such an assignment is not carried over",
                "7: the import of another recipe is not followed: give its file with --base",
            ]
        );
    }

    #[test]
    fn wrong_indentation_is_no_python() {
        let wrong = "the line is indented unlike those around it";
        assert_eq!(shown(" a = 1\n"), [format!("1: {wrong}")]);
        assert_eq!(shown("a = 1\n  b = 2\n"), [format!("2: {wrong}")]);
        assert_eq!(shown("if 1:\n    a = 1\n  b = 2\n"), [format!("3: {wrong}")]);
        assert_eq!(
            shown("if 1:\na = 1\n"),
            ["1: the lines that belong to it are missing"]
        );
        assert_eq!(shown("if 1\n"), ["1: a colon is missing"]);
        let deep: String = (0..100)
            .map(|depth| format!("{}if 1:\n", " ".repeat(depth)))
            .collect();
        assert_eq!(shown(&deep), ["21: more than 20 blocks inside each other"]);
    }
}
