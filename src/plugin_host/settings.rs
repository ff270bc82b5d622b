//! Settings of a plugin against the schema that it came with.

use jsonschema::Validator;
use jsonschema::error::ValidationErrorKind;
use serde_json::Value;

/// One wrong value of a plugin's settings.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SettingError {
    /// JSON Pointer within the settings; absent when there is no such optimizer or scheduler.
    pub pointer: Option<String>,
    /// What was found and what was expected.
    pub message: String,
}

/// Makes a validator of a plugin's schema.
pub fn validator(schema: &Value) -> Result<Validator, String> {
    if !schema.is_object() {
        return Err("the settings schema is no JSON object".to_owned());
    }
    jsonschema::validator_for(schema)
        .map_err(|error| format!("the settings schema is invalid: {error}"))
}

/// Every wrong value.
pub fn check(
    validator: &Validator,
    schema: &Value,
    settings: &Value,
) -> Result<(), Vec<SettingError>> {
    let mut wrong = Vec::new();
    for error in validator.iter_errors(settings) {
        let at = error.instance_path().to_string();
        if let ValidationErrorKind::AdditionalProperties { unexpected } = error.kind() {
            wrong.extend(unexpected.iter().map(|name| unknown(&at, name, schema)));
        } else {
            wrong.push(SettingError {
                pointer: Some(at),
                message: error.to_string(),
            });
        }
    }
    if wrong.is_empty() { Ok(()) } else { Err(wrong) }
}

fn unknown(at: &str, name: &str, schema: &Value) -> SettingError {
    let known: Vec<&str> = schema["properties"]
        .as_object()
        .map(|properties| properties.keys().map(String::as_str).collect())
        .unwrap_or_default();
    let near = known
        .iter()
        .map(|known| (distance(name, known), known))
        .min();
    let advice = match near {
        Some((edits, known)) if edits <= 2 => format!("did you mean `{known}`?"),
        _ if known.is_empty() => "this takes no settings".to_owned(),
        _ => format!("expected one of: {}", known.join(", ")),
    };
    let token = name.replace('~', "~0").replace('/', "~1");
    SettingError {
        pointer: Some(format!("{at}/{token}")),
        message: format!("unknown setting `{name}`; {advice}"),
    }
}

/// Edits (insertions, removals, replacements) between two words: Levenshtein's distance.
pub(super) fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let replaced = diagonal + usize::from(x != *y);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn problems(settings: &Value) -> Vec<(String, String)> {
        let schema = json!({
            "type": "object", "additionalProperties": false,
            "properties": {
                "weight_decay": {"type": "number", "minimum": 0.0},
                "betas": {"type": "array", "items": {"type": "number", "exclusiveMaximum": 1.0}},
            },
        });
        let validator = validator(&schema).expect("a schema");
        let errors = check(&validator, &schema, settings)
            .err()
            .unwrap_or_default();
        let pair = |error: SettingError| (error.pointer.expect("a pointer"), error.message);
        errors.into_iter().map(pair).collect()
    }

    #[test]
    fn wrong_settings_are_named() {
        assert_eq!(
            problems(&json!({"weight_decay": 0.5, "betas": [0.9, 0.5]})),
            []
        );
        for (settings, pointer, word) in [
            (json!({"weight_decay": -1}), "/weight_decay", "-1"),
            (json!({"weight_decay": "much"}), "/weight_decay", "number"),
            (json!({"betas": [0.9, 1.0]}), "/betas/1", "1"),
            (
                json!({"weight_dekay": 1}),
                "/weight_dekay",
                "`weight_decay`",
            ),
            (json!({"momentum": 1}), "/momentum", "betas, weight_decay"),
            (json!([]), "", "object"),
        ] {
            let found = problems(&settings);
            assert_eq!(found.len(), 1, "{settings}: {found:?}");
            assert_eq!(found[0].0, pointer);
            assert!(found[0].1.contains(word), "{found:?}");
        }
    }

    #[test]
    fn distances_by_hand() {
        for (a, b, edits) in [
            ("", "abc", 3),
            ("beta", "betas", 1),
            ("kitten", "sitting", 3),
            ("x", "x", 0),
        ] {
            assert_eq!(distance(a, b), edits, "{a} {b}");
        }
    }

    #[test]
    fn a_schema_must_be_one() {
        assert!(validator(&json!(3)).is_err());
        assert!(validator(&json!({"type": "nonsense"})).is_err());
    }
}
