//! Python source to logical lines of tokens: comments dropped, lines in brackets and after a backslash joined. Knows
//! no grammar. It reads all of Python's tokens, so that what it cannot make sense of is no Python either.

/// What a token is.
#[derive(Clone, Debug, PartialEq)]
pub enum Token {
    /// A name or a keyword.
    Name(String),
    /// A whole number.
    Whole(i64),
    /// A number with a point or an exponent.
    Real(f64),
    /// A string, its escapes resolved.
    Text(String),
    /// An operator or a bracket.
    Sign(&'static str),
    /// A literal that is not evaluated, and why: an f-string, bytes, an imaginary or too large a number.
    Other(&'static str),
}

/// A token and where it stands in the source, in bytes.
#[derive(Clone, Debug, PartialEq)]
pub struct Placed {
    /// The token.
    pub token: Token,
    /// First byte.
    pub start: usize,
    /// One past its last byte.
    pub end: usize,
}

/// A statement, or the head of a compound one.
#[derive(Clone, Debug, PartialEq)]
pub struct Line {
    /// Line of its first token, from 1.
    pub number: usize,
    /// Column of its first token, from 0, tabs to the next multiple of 8.
    pub indent: usize,
    /// At least one.
    pub tokens: Vec<Placed>,
}

/// Text that is not Python.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Malformed {
    /// Line, from 1.
    pub line: usize,
    /// What is wrong.
    pub problem: String,
}

/// Operators and brackets, longer ones before those that they begin with.
const SIGNS: [&str; 48] = [
    "**=", "//=", ">>=", "<<=", "...", "**", "//", ">>", "<<", "<=", ">=", "==", "!=", "->", "+=", "-=",
    "*=", "/=", "%=", "&=", "|=", "^=", "@=", ":=", "+", "-", "*", "/", "%", "@", "&", "|", "^", "~", "<",
    ">", "(", ")", "[", "]", "{", "}", ",", ":", ".", ";", "=", "\\",
];

/// What may stand before a string's quote, in lower case.
const PREFIXES: [&str; 8] = ["r", "u", "b", "f", "br", "rb", "fr", "rf"];

/// Splits source text into logical lines.
///
/// # Errors
/// [`Malformed`] where a character, a string or a bracket cannot be Python.
pub fn lines(source: &str) -> Result<Vec<Line>, Malformed> {
    let mut lexer = Lexer {
        source,
        // A byte order mark is no part of the text.
        at: if source.starts_with('\u{feff}') { 3 } else { 0 },
        number: 1,
        brackets: Vec::new(),
    };
    let mut lines = Vec::new();
    while let Some(line) = lexer.line()? {
        lines.push(line);
    }
    Ok(lines)
}

struct Lexer<'a> {
    source: &'a str,
    at: usize,
    number: usize,
    /// Open brackets with their lines.
    brackets: Vec<(&'static str, usize)>,
}

impl Lexer<'_> {
    fn rest(&self) -> &str {
        &self.source[self.at..]
    }

    fn peek(&self) -> Option<char> {
        self.rest().chars().next()
    }

    fn take(&mut self) -> Option<char> {
        let c = self.peek()?;
        self.at += c.len_utf8();
        if c == '\n' {
            self.number += 1;
        }
        Some(c)
    }

    fn take_while(&mut self, wanted: impl Fn(char) -> bool) -> &str {
        let length = self.rest().find(|c| !wanted(c)).unwrap_or(self.rest().len());
        self.at += length;
        &self.source[self.at - length..self.at]
    }

    fn malformed<T>(&self, problem: impl Into<String>) -> Result<T, Malformed> {
        Err(Malformed {
            line: self.number,
            problem: problem.into(),
        })
    }

    /// The next logical line; `None` at the end.
    fn line(&mut self) -> Result<Option<Line>, Malformed> {
        let mut line = Line {
            number: 0,
            indent: 0,
            tokens: Vec::new(),
        };
        let mut indent = 0;
        while let Some(c) = self.peek() {
            match c {
                '\n' => {
                    self.take();
                    if self.brackets.is_empty() {
                        if !line.tokens.is_empty() {
                            return Ok(Some(line));
                        }
                        indent = 0;
                    }
                }
                ' ' | '\r' | '\u{c}' => {
                    self.take();
                    indent += usize::from(c == ' ');
                }
                '\t' => {
                    self.take();
                    indent = (indent / 8 + 1) * 8;
                }
                '#' => {
                    self.take_while(|c| c != '\n');
                }
                '\\' if self.rest()[1..].trim_start_matches('\r').starts_with('\n') => {
                    while self.take() != Some('\n') {}
                }
                _ => {
                    if line.tokens.is_empty() {
                        (line.number, line.indent) = (self.number, indent);
                    }
                    let start = self.at;
                    let token = self.token(c)?;
                    line.tokens.push(Placed {
                        token,
                        start,
                        end: self.at,
                    });
                }
            }
        }
        if let Some((sign, number)) = self.brackets.pop() {
            self.number = number;
            return self.malformed(format!("{sign:?} is never closed"));
        }
        Ok(Some(line).filter(|line| !line.tokens.is_empty()))
    }

    fn token(&mut self, first: char) -> Result<Token, Malformed> {
        let digit_after_point = || first == '.' && self.rest()[1..].starts_with(|c: char| c.is_ascii_digit());
        if first.is_ascii_digit() || digit_after_point() {
            return self.number();
        }
        if first == '"' || first == '\'' {
            return self.string("");
        }
        if first.is_alphabetic() || first == '_' {
            let word = self.take_while(|c| c.is_alphanumeric() || c == '_').to_owned();
            let prefix = word.to_lowercase();
            if PREFIXES.contains(&prefix.as_str()) && matches!(self.peek(), Some('"' | '\'')) {
                return self.string(&prefix);
            }
            return Ok(Token::Name(word));
        }
        let Some(sign) = SIGNS.iter().find(|sign| self.rest().starts_with(**sign)) else {
            return self.malformed(format!("{first:?} is not Python"));
        };
        match *sign {
            "\\" => return self.malformed("a backslash that does not end its line"),
            "(" | "[" | "{" => self.brackets.push((sign, self.number)),
            ")" | "]" | "}" => {
                let opened = self.brackets.pop().map(|(open, _)| open);
                if !matches!(
                    (opened, *sign),
                    (Some("("), ")") | (Some("["), "]") | (Some("{"), "}")
                ) {
                    return self.malformed(format!("{sign:?} closes nothing"));
                }
            }
            _ => {}
        }
        self.at += sign.len();
        Ok(Token::Sign(sign))
    }

    fn number(&mut self) -> Result<Token, Malformed> {
        let start = self.at;
        let radix = match self.rest().get(..2) {
            Some("0x" | "0X") => 16,
            Some("0o" | "0O") => 8,
            Some("0b" | "0B") => 2,
            _ => 10,
        };
        if radix != 10 {
            self.at += 2;
            let digits = self
                .take_while(|c| c.is_ascii_alphanumeric() || c == '_')
                .replace('_', "");
            return match i64::from_str_radix(&digits, radix) {
                Ok(number) => Ok(Token::Whole(number)),
                Err(_) if !digits.is_empty() && digits.chars().all(|c| c.is_digit(radix)) => {
                    Ok(Token::Other("a number of more than 63 bits"))
                }
                Err(_) => self.malformed("a number with wrong digits"),
            };
        }
        let is_digit = |c: char| c.is_ascii_digit() || c == '_';
        self.take_while(is_digit);
        let mut whole = true;
        if self.peek() == Some('.') {
            whole = false;
            self.take();
            self.take_while(is_digit);
        }
        let exponent = self.rest().strip_prefix(['e', 'E']);
        if exponent.is_some_and(|rest| {
            rest.trim_start_matches(['+', '-'])
                .starts_with(|c: char| c.is_ascii_digit())
        }) {
            whole = false;
            self.take();
            self.take_while(|c| c == '+' || c == '-');
            self.take_while(is_digit);
        }
        let text = self.source[start..self.at].replace('_', "");
        if matches!(self.peek(), Some('j' | 'J')) {
            self.take();
            return Ok(Token::Other("an imaginary number"));
        }
        if self.peek().is_some_and(|c| c.is_alphanumeric() || c == '_') {
            return self.malformed("a number that goes on in letters");
        }
        if whole {
            return Ok(text
                .parse()
                .map_or(Token::Other("a number of more than 63 bits"), Token::Whole));
        }
        text.parse()
            .map(Token::Real)
            .or_else(|_| self.malformed("a number that is none"))
    }

    /// A string whose prefix was read; its quote comes next.
    fn string(&mut self, prefix: &str) -> Result<Token, Malformed> {
        let opened = self.number;
        let Some(quote) = self.take() else {
            return self.malformed("a string without a quote");
        };
        let triple: String = [quote; 3].iter().collect();
        let long = self.rest().starts_with(&triple[..2]);
        if long {
            self.at += 2;
        }
        let mut text = String::new();
        loop {
            if long && self.rest().starts_with(&triple) {
                self.at += 3;
                break;
            }
            match self.take() {
                Some(c) if c == quote && !long => break,
                Some('\n') if !long => {
                    self.number = opened;
                    return self.malformed("a string that does not end");
                }
                Some('\\') => match self.take() {
                    None => {}
                    Some(c) if prefix.contains('r') => text.extend(['\\', c]),
                    Some(c) => self.escape(c, &mut text),
                },
                Some(c) => text.push(c),
                None => {
                    self.number = opened;
                    return self.malformed("a string that does not end");
                }
            }
        }
        Ok(literal(prefix, text))
    }

    /// What a backslash and `c` stand for.
    fn escape(&mut self, c: char, text: &mut String) {
        let digits = match c {
            'x' => 2,
            'u' => 4,
            'U' => 8,
            _ => 0,
        };
        let code = self
            .rest()
            .get(..digits)
            .and_then(|code| u32::from_str_radix(code, 16).ok());
        match (c, code.and_then(char::from_u32)) {
            ('x' | 'u' | 'U', Some(character)) => {
                self.at += digits;
                text.push(character);
            }
            ('\n', _) => {}
            ('n', _) => text.push('\n'),
            ('t', _) => text.push('\t'),
            ('r', _) => text.push('\r'),
            ('0', _) => text.push('\0'),
            ('\\' | '\'' | '"', _) => text.push(c),
            _ => text.extend(['\\', c]),
        }
    }
}

fn literal(prefix: &str, text: String) -> Token {
    match prefix {
        "" | "r" | "u" => Token::Text(text),
        _ if prefix.contains('b') => Token::Other("bytes"),
        _ => Token::Other("a formatted string"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tokens(source: &str) -> Vec<Token> {
        let lines = lines(source).expect("Python");
        lines
            .into_iter()
            .flat_map(|line| line.tokens)
            .map(|placed| placed.token)
            .collect()
    }

    fn problem(source: &str) -> (usize, String) {
        let malformed = lines(source).expect_err("no Python");
        (malformed.line, malformed.problem)
    }

    #[test]
    fn literals_are_read_as_python_reads_them() {
        let text = |text: &str| Token::Text(text.into());
        let cases = [
            ("5e-4", Token::Real(5e-4)),
            (".5", Token::Real(0.5)),
            ("1.", Token::Real(1.0)),
            ("1_000", Token::Whole(1000)),
            ("0x10", Token::Whole(16)),
            (
                "9223372036854775808",
                Token::Other("a number of more than 63 bits"),
            ),
            ("2j", Token::Other("an imaginary number")),
            ("''", text("")),
            ("\"a # b\"  # c", text("a # b")),
            ("'it\\'s\\x41\\q'", text("it'sA\\q")),
            ("r'\\n'", text("\\n")),
            ("u'\\n'", text("\n")),
            ("'''a\n\"b'''", text("a\n\"b")),
            ("''''a'''", text("'a")),
            ("f'{x}'", Token::Other("a formatted string")),
            ("Rb'x'", Token::Other("bytes")),
        ];
        for (source, token) in cases {
            assert_eq!(tokens(source), [token], "{source}");
        }
    }

    #[test]
    fn lines_are_joined_in_brackets_and_after_a_backslash() {
        let source = "a = [1,  # one\n  2]\n\n  # nothing\n\tb = \\\r\n 3\r\n";
        let found: Vec<_> = lines(source)
            .expect("Python")
            .iter()
            .map(|line| (line.number, line.indent, line.tokens.len()))
            .collect();
        assert_eq!(found, [(1, 0, 7), (5, 8, 3)]);
    }

    #[test]
    fn what_is_no_python_is_said_with_its_line() {
        assert_eq!(
            problem("a = 1\nb = 'x\n"),
            (2, "a string that does not end".into())
        );
        assert_eq!(problem("a = '''\n\n"), (1, "a string that does not end".into()));
        assert_eq!(problem("a = (1,\n2"), (1, "\"(\" is never closed".into()));
        assert_eq!(problem("a = (1]"), (1, "\"]\" closes nothing".into()));
        assert_eq!(problem("\na = $x"), (2, "'$' is not Python".into()));
        assert_eq!(problem("a = 1x"), (1, "a number that goes on in letters".into()));
        assert_eq!(problem("a = 0b12"), (1, "a number with wrong digits".into()));
        assert_eq!(
            problem("a \\ b"),
            (1, "a backslash that does not end its line".into())
        );
    }
}
