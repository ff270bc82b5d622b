//! Weights in prompts, in the style of A1111: `(more)`, `(more:1.4)`, `[less]`, and `\(` for a bracket.
//!
//! Source: `parse_prompt_attention` of AUTOMATIC1111's web UI, as sd-scripts has it in `library/strategy_base.py`.

/// What a round bracket without a number multiplies by; a square one divides.
const STEP: f64 = 1.1;

/// A part of a prompt and its weight.
#[derive(Clone, Debug, PartialEq)]
pub struct Weighted {
    pub text: String,
    pub weight: f64,
}

/// Splits a prompt at its weights; neighbours differ in weight. What is not closed goes to the end, and a bracket that
/// was not opened is text.
pub fn parse(prompt: &str) -> Vec<Weighted> {
    let mut parts: Vec<Weighted> = Vec::new();
    let (mut round, mut square) = (Vec::new(), Vec::new());
    let mut rest = prompt;
    while let Some(token) = Token::next(&mut rest) {
        let (opened, factor) = match token {
            Token::OpenRound => {
                round.push(parts.len());
                continue;
            }
            Token::OpenSquare => {
                square.push(parts.len());
                continue;
            }
            Token::CloseRound(_, factor) => (round.pop(), factor),
            Token::CloseSquare => (square.pop(), 1.0 / STEP),
            Token::Text(_) => (None, 1.0),
        };
        match opened {
            Some(from) => multiply(&mut parts, from, factor),
            None => parts.push(Weighted {
                text: token.text().to_owned(),
                weight: 1.0,
            }),
        }
    }
    for from in round {
        multiply(&mut parts, from, STEP);
    }
    for from in square {
        multiply(&mut parts, from, 1.0 / STEP);
    }
    merge(parts)
}

fn multiply(parts: &mut [Weighted], from: usize, factor: f64) {
    for part in &mut parts[from..] {
        part.weight *= factor;
    }
}

/// Neighbours of equal weight become one, so that words are not torn.
fn merge(parts: Vec<Weighted>) -> Vec<Weighted> {
    let mut merged: Vec<Weighted> = Vec::with_capacity(parts.len());
    for part in parts {
        match merged.last_mut() {
            Some(last) if last.weight.to_bits() == part.weight.to_bits() => {
                last.text.push_str(&part.text);
            }
            _ => merged.push(part),
        }
    }
    merged
}

/// A piece of a prompt.
enum Token<'a> {
    Text(&'a str),
    OpenRound,
    OpenSquare,
    /// `)`, or `:1.4)`, and what it multiplies by.
    CloseRound(&'a str, f64),
    CloseSquare,
}

impl<'a> Token<'a> {
    /// Takes the next one off a text.
    fn next(rest: &mut &'a str) -> Option<Self> {
        let text = *rest;
        let first = text.chars().next()?;
        let (token, length) = match first {
            '\\' => {
                // What is behind it is text; a backslash before anything else is dropped.
                let escaped = text[1..].chars().next();
                let special = escaped.is_some_and(|c| "()[]\\".contains(c));
                let length = if special { 2 } else { 1 };
                (Self::Text(&text[1..length]), length)
            }
            '(' => (Self::OpenRound, 1),
            '[' => (Self::OpenSquare, 1),
            ')' => (Self::CloseRound(&text[..1], STEP), 1),
            ']' => (Self::CloseSquare, 1),
            ':' => match number_and_bracket(text) {
                Some((factor, length)) => (Self::CloseRound(&text[..length], factor), length),
                None => (Self::Text(&text[..1]), 1),
            },
            _ => {
                let length = text.find(['\\', '(', ')', '[', ']', ':']);
                let length = length.unwrap_or(text.len());
                (Self::Text(&text[..length]), length)
            }
        };
        *rest = &text[length..];
        Some(token)
    }

    fn text(&self) -> &'a str {
        match self {
            Self::Text(text) | Self::CloseRound(text, _) => text,
            Self::OpenRound => "(",
            Self::OpenSquare => "[",
            Self::CloseSquare => "]",
        }
    }
}

/// The number of `:1.4)` at the start of a text, and the length of all that.
fn number_and_bracket(text: &str) -> Option<(f64, usize)> {
    let number = &text[1..text.find(')')?];
    let digits = number.strip_prefix(['+', '-']).unwrap_or(number);
    let plain = digits.chars().all(|c| c == '.' || c.is_ascii_digit());
    let value = number.parse::<f64>().ok().filter(|_| plain)?;
    Some((value, number.len() + 2))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parts(prompt: &str) -> Vec<(String, f64)> {
        let round = |weight: f64| (weight * 1e6).round() / 1e6;
        let parsed = parse(prompt).into_iter();
        parsed.map(|part| (part.text, round(part.weight))).collect()
    }

    #[test]
    fn prompts_are_split_as_in_the_examples_of_the_reference() {
        let expect = |prompt: &str, expected: &[(&str, f64)]| {
            let expected: Vec<_> = expected
                .iter()
                .map(|(text, weight)| ((*text).to_owned(), *weight))
                .collect();
            assert_eq!(parts(prompt), expected, "{prompt}");
        };
        expect("normal text", &[("normal text", 1.0)]);
        expect(
            "an (important) word",
            &[("an ", 1.0), ("important", 1.1), (" word", 1.0)],
        );
        expect("(unbalanced", &[("unbalanced", 1.1)]);
        expect(r"\(literal\]", &[("(literal]", 1.0)]);
        expect("(unnecessary)(parens)", &[("unnecessaryparens", 1.1)]);
        expect(
            "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).",
            &[
                ("a ", 1.0),
                ("house", 1.573),
                (" ", 1.1),
                ("on", 1.0),
                (" a ", 1.1),
                ("hill", 0.55),
                (", sun, ", 1.1),
                ("sky", 1.4641),
                (".", 1.1),
            ],
        );
    }

    #[test]
    fn what_is_no_weight_is_text() {
        for (prompt, expected) in [
            ("a:1.2)", vec![("a:1.2)", 1.0)]),
            ("a) b]", vec![("a) b]", 1.0)]),
            ("(a:b)", vec![("a:b", 1.1)]),
            // Python would fail here.
            ("(a:1.2.3)", vec![("a:1.2.3", 1.1)]),
            ("(a:-0.5)", vec![("a", -0.5)]),
            (r"c\d \\", vec![(r"cd \", 1.0)]),
            ("é:ü", vec![("é:ü", 1.0)]),
        ] {
            let expected: Vec<_> = expected
                .into_iter()
                .map(|(text, weight)| (text.to_owned(), weight))
                .collect();
            assert_eq!(parts(prompt), expected, "{prompt}");
        }
        assert_eq!(parse(""), []);
    }

    #[test]
    fn nothing_that_is_typed_panics() {
        for prompt in ["\\", ":", "(:", "[[((:1)", "(((((]]]", "a\\é", ":)", "(:)"] {
            parse(prompt);
        }
        let deep = "(".repeat(3000);
        assert!(parse(&format!("{deep}a"))[0].weight > 1e100);
    }
}
