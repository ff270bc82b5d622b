//! serde over a parsed JSON value (or over query parameters) that remembers where it failed,
//! so that an answer can name the field by JSON Pointer at any depth.

use std::cell::RefCell;
use std::fmt;

use serde::de::{self, DeserializeOwned, DeserializeSeed, IntoDeserializer, Visitor};
use serde_json::Value;

use super::problem::FieldError;

/// Reads `T` out of a JSON value.
pub fn from_json<T: DeserializeOwned>(value: Value) -> Result<T, FieldError> {
    decode(value, false)
}

/// Reads `T` out of query parameters; numbers and booleans are parsed from their text.
pub fn from_pairs<T: DeserializeOwned>(pairs: Vec<(String, String)>) -> Result<T, FieldError> {
    let mut map = serde_json::Map::new();
    for (name, text) in pairs {
        if map.contains_key(&name) {
            return Err(FieldError::new(
                pointer("", &name),
                "invalid_value",
                "given more than once",
            ));
        }
        map.insert(name, Value::String(text));
    }
    decode(Value::Object(map), true)
}

/// Appends one escaped token to a JSON Pointer (RFC 6901).
pub fn pointer(base: &str, token: &str) -> String {
    format!("{base}/{}", token.replace('~', "~0").replace('/', "~1"))
}

fn decode<T: DeserializeOwned>(value: Value, text: bool) -> Result<T, FieldError> {
    let failed_at = RefCell::new(None);
    let node = Node {
        value,
        path: String::new(),
        text,
        failed_at: &failed_at,
    };
    T::deserialize(node).map_err(|error| {
        let path = failed_at.into_inner().unwrap_or_default();
        field_error(path, &error.0)
    })
}

/// serde's messages are a fixed set; what they mean for the pointer is told by how they begin.
fn field_error(path: String, message: &str) -> FieldError {
    let quoted = |message: &str| message.split('`').nth(1).map(str::to_owned);
    if message.starts_with("missing field") {
        let name = quoted(message).unwrap_or_default();
        return FieldError::new(
            pointer(&path, &name),
            "missing_field",
            format!("the field `{name}` is needed"),
        );
    }
    if message.starts_with("unknown field") {
        // a field deserializer reports at the key; a flattened struct only at the object
        let name = quoted(message).unwrap_or_default();
        let at = pointer("", &name);
        let path = if path.ends_with(&at) {
            path
        } else {
            pointer(&path, &name)
        };
        return FieldError::new(path, "unknown_field", message);
    }
    let code = if message.starts_with("invalid type") {
        "wrong_type"
    } else {
        "invalid_value"
    };
    FieldError::new(path, code, message)
}

#[derive(Debug)]
struct Failure(String);

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Failure {}

impl de::Error for Failure {
    fn custom<T: fmt::Display>(message: T) -> Self {
        Failure(message.to_string())
    }
}

/// One value and its place. The innermost node that fails writes its path; the ones around it leave it.
struct Node<'a> {
    value: Value,
    path: String,
    text: bool,
    failed_at: &'a RefCell<Option<String>>,
}

impl<'a> Node<'a> {
    fn note<T>(
        failed_at: &RefCell<Option<String>>,
        path: &str,
        result: Result<T, Failure>,
    ) -> Result<T, Failure> {
        if result.is_err() {
            failed_at
                .borrow_mut()
                .get_or_insert_with(|| path.to_owned());
        }
        result
    }

    /// A value that holds no other: serde_json knows how to hand it over.
    fn leaf<'de, V: Visitor<'de>>(
        self,
        call: impl FnOnce(Value, V) -> Result<V::Value, serde_json::Error>,
        visitor: V,
    ) -> Result<V::Value, Failure> {
        let result = call(self.value, visitor).map_err(|error| Failure(error.to_string()));
        Self::note(self.failed_at, &self.path, result)
    }

    /// In query parameters `3` and `true` arrive as text; a text that is neither stays one and fails as a wrong type.
    fn parsed(mut self) -> Self {
        if self.text
            && let Value::String(text) = &self.value
            && let Ok(value @ (Value::Number(_) | Value::Bool(_))) = serde_json::from_str(text)
        {
            self.value = value;
        }
        self
    }
}

macro_rules! leaves {
    ($($method:ident)*) => {$(
        fn $method<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Failure> {
            self.parsed().leaf(|value, visitor| value.$method(visitor), visitor)
        }
    )*};
}

macro_rules! compounds {
    ($($method:ident($($arg:ident: $kind:ty),*))*) => {$(
        fn $method<V: Visitor<'de>>(self, $($arg: $kind,)* visitor: V) -> Result<V::Value, Failure> {
            $(let _ = $arg;)*
            self.deserialize_any(visitor)
        }
    )*};
}

impl<'de> de::Deserializer<'de> for Node<'_> {
    type Error = Failure;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Failure> {
        let Node {
            value,
            path,
            text,
            failed_at,
        } = self;
        let result = match value {
            Value::Array(items) => {
                let length = items.len();
                let mut items = Items {
                    rest: items.into_iter().enumerate(),
                    path: &path,
                    text,
                    failed_at,
                };
                visitor
                    .visit_seq(&mut items)
                    .and_then(|value| match items.rest.len() {
                        0 => Ok(value),
                        _ => Err(de::Error::invalid_length(length, &"fewer elements")),
                    })
            }
            Value::Object(fields) => visitor.visit_map(Fields {
                rest: fields.into_iter(),
                next: None,
                path: &path,
                text,
                failed_at,
            }),
            leaf => {
                return Node {
                    value: leaf,
                    path,
                    text,
                    failed_at,
                }
                .leaf(de::Deserializer::deserialize_any, visitor);
            }
        };
        Self::note(failed_at, &path, result)
    }

    leaves! {
        deserialize_bool deserialize_i8 deserialize_i16 deserialize_i32 deserialize_i64 deserialize_i128
        deserialize_u8 deserialize_u16 deserialize_u32 deserialize_u128 deserialize_f32 deserialize_f64
    }

    /// The document says `int64`: clients have no larger numbers, and neither has the database.
    fn deserialize_u64<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Failure> {
        let node = self.parsed();
        let number = node.value.as_u64();
        if let Some(number) = number.filter(|number| *number > i64::MAX.unsigned_abs()) {
            let found = de::Unexpected::Unsigned(number);
            let refused = de::Error::invalid_value(found, &"at most 9223372036854775807");
            return Self::note(node.failed_at, &node.path, Err(refused));
        }
        node.leaf(de::Deserializer::deserialize_u64, visitor)
    }

    /// serde would take the fields in their order as well: that is no part of the API.
    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        _: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Failure> {
        if self.value.is_array() {
            let refused = de::Error::invalid_type(de::Unexpected::Seq, &"an object");
            return Self::note(self.failed_at, &self.path, Err(refused));
        }
        self.deserialize_any(visitor)
    }

    compounds! {
        deserialize_char() deserialize_str() deserialize_string() deserialize_bytes() deserialize_byte_buf()
        deserialize_unit() deserialize_unit_struct(name: &'static str) deserialize_seq() deserialize_tuple(len: usize)
        deserialize_tuple_struct(name: &'static str, len: usize) deserialize_map()
        deserialize_identifier()
        deserialize_ignored_any()
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Failure> {
        let (failed_at, path) = (self.failed_at, self.path.clone());
        let result = if self.value.is_null() {
            visitor.visit_none()
        } else {
            visitor.visit_some(self)
        };
        Self::note(failed_at, &path, result)
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        visitor: V,
    ) -> Result<V::Value, Failure> {
        let (failed_at, path) = (self.failed_at, self.path.clone());
        let result = visitor.visit_newtype_struct(self);
        Self::note(failed_at, &path, result)
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _: &'static str,
        _: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Failure> {
        let Node {
            value,
            path,
            text,
            failed_at,
        } = self;
        let result = match value {
            Value::String(variant) => visitor.visit_enum(Variant {
                variant,
                content: None,
            }),
            Value::Object(fields) if fields.len() == 1 => match fields.into_iter().next() {
                Some((variant, content)) => {
                    let path = pointer(&path, &variant);
                    visitor.visit_enum(Variant {
                        variant,
                        content: Some(Node {
                            value: content,
                            path,
                            text,
                            failed_at,
                        }),
                    })
                }
                None => Err(Failure("expected one variant".to_owned())),
            },
            other => {
                return Node {
                    value: other,
                    path,
                    text,
                    failed_at,
                }
                .leaf(|v, visitor| v.deserialize_enum("", &[], visitor), visitor);
            }
        };
        Self::note(failed_at, &path, result)
    }
}

struct Items<'a> {
    rest: std::iter::Enumerate<std::vec::IntoIter<Value>>,
    path: &'a str,
    text: bool,
    failed_at: &'a RefCell<Option<String>>,
}

impl<'de> de::SeqAccess<'de> for &mut Items<'_> {
    type Error = Failure;

    fn next_element_seed<T: DeserializeSeed<'de>>(
        &mut self,
        seed: T,
    ) -> Result<Option<T::Value>, Failure> {
        let Some((index, value)) = self.rest.next() else {
            return Ok(None);
        };
        let path = pointer(self.path, &index.to_string());
        seed.deserialize(Node {
            value,
            path,
            text: self.text,
            failed_at: self.failed_at,
        })
        .map(Some)
    }

    fn size_hint(&self) -> Option<usize> {
        Some(self.rest.len())
    }
}

struct Fields<'a> {
    rest: serde_json::map::IntoIter,
    next: Option<(String, Value)>,
    path: &'a str,
    text: bool,
    failed_at: &'a RefCell<Option<String>>,
}

impl<'de> de::MapAccess<'de> for Fields<'_> {
    type Error = Failure;

    fn next_key_seed<K: DeserializeSeed<'de>>(
        &mut self,
        seed: K,
    ) -> Result<Option<K::Value>, Failure> {
        let Some((name, value)) = self.rest.next() else {
            return Ok(None);
        };
        let path = pointer(self.path, &name);
        let result = seed.deserialize(name.as_str().into_deserializer());
        self.next = Some((path.clone(), value));
        Node::note(self.failed_at, &path, result).map(Some)
    }

    fn next_value_seed<V: DeserializeSeed<'de>>(&mut self, seed: V) -> Result<V::Value, Failure> {
        let (path, value) = self
            .next
            .take()
            .unwrap_or((self.path.to_owned(), Value::Null));
        seed.deserialize(Node {
            value,
            path,
            text: self.text,
            failed_at: self.failed_at,
        })
    }

    fn size_hint(&self) -> Option<usize> {
        Some(self.rest.len())
    }
}

struct Variant<'a> {
    variant: String,
    content: Option<Node<'a>>,
}

impl<'de, 'a> de::EnumAccess<'de> for Variant<'a> {
    type Error = Failure;
    type Variant = Content<'a>;

    fn variant_seed<V: DeserializeSeed<'de>>(
        self,
        seed: V,
    ) -> Result<(V::Value, Content<'a>), Failure> {
        let variant = seed.deserialize(self.variant.as_str().into_deserializer())?;
        Ok((variant, Content(self.content)))
    }
}

struct Content<'a>(Option<Node<'a>>);

impl<'a> Content<'a> {
    fn needed(self) -> Result<Node<'a>, Failure> {
        self.0.ok_or_else(|| {
            de::Error::invalid_type(de::Unexpected::UnitVariant, &"a variant with content")
        })
    }
}

impl<'de> de::VariantAccess<'de> for Content<'_> {
    type Error = Failure;

    fn unit_variant(self) -> Result<(), Failure> {
        match self.0 {
            None => Ok(()),
            Some(node) => de::Deserialize::deserialize(node),
        }
    }

    fn newtype_variant_seed<T: DeserializeSeed<'de>>(self, seed: T) -> Result<T::Value, Failure> {
        seed.deserialize(self.needed()?)
    }

    fn tuple_variant<V: Visitor<'de>>(self, _: usize, visitor: V) -> Result<V::Value, Failure> {
        de::Deserializer::deserialize_any(self.needed()?, visitor)
    }

    fn struct_variant<V: Visitor<'de>>(
        self,
        _: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Failure> {
        de::Deserializer::deserialize_any(self.needed()?, visitor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde::Deserialize;
    use serde_json::json;

    #[derive(Debug, Deserialize, PartialEq)]
    #[serde(deny_unknown_fields)]
    struct Outer {
        name: String,
        #[serde(default)]
        inner: Option<Inner>,
        #[serde(default)]
        list: Vec<Inner>,
    }

    #[derive(Debug, Deserialize, PartialEq)]
    #[serde(deny_unknown_fields)]
    struct Inner {
        rank: u32,
        #[serde(default)]
        kind: Kind,
    }

    #[derive(Debug, Default, Deserialize, PartialEq)]
    #[serde(rename_all = "snake_case")]
    enum Kind {
        #[default]
        Plain,
        Sized {
            px: u32,
        },
    }

    fn failure(value: Value) -> (String, String) {
        let error = from_json::<Outer>(value).expect_err("a wrong value");
        (error.pointer, error.code)
    }

    fn pair(pointer: &str, code: &str) -> (String, String) {
        (pointer.to_owned(), code.to_owned())
    }

    #[test]
    fn fields_have_names_and_numbers_are_those_of_the_document() {
        let nameless = json!({"name": "a", "inner": [4]});
        assert_eq!(failure(nameless), pair("/inner", "wrong_type"));
        assert_eq!(failure(json!(["a"])), pair("", "wrong_type"));
        #[derive(Debug, Deserialize)]
        struct Query {
            after: u64,
        }
        let read = |after: u64| {
            let query = from_pairs::<Query>(vec![("after".to_owned(), after.to_string())]);
            query.map(|query| query.after)
        };
        assert_eq!(
            read(i64::MAX.unsigned_abs()).expect("in range"),
            i64::MAX.unsigned_abs()
        );
        let error = read(1 << 63).expect_err("out of range");
        assert_eq!(error.pointer, "/after");
        assert!(error.message.contains("at most"), "{}", error.message);
    }

    #[test]
    fn good_values_are_read() {
        let value = json!({"name": "a", "inner": {"rank": 4, "kind": {"sized": {"px": 3}}}, "list": [{"rank": 1}]});
        let outer: Outer = from_json(value).expect("a right value");
        assert_eq!(
            outer.inner,
            Some(Inner {
                rank: 4,
                kind: Kind::Sized { px: 3 }
            })
        );
        assert_eq!(
            outer.list,
            [Inner {
                rank: 1,
                kind: Kind::Plain
            }]
        );
    }

    #[test]
    fn every_failure_names_its_place() {
        assert_eq!(
            failure(json!({"name": "a", "nome": 1})),
            pair("/nome", "unknown_field")
        );
        assert_eq!(
            failure(json!({"name": "a", "inner": {"rank": 1, "a/b": 1}})),
            pair("/inner/a~1b", "unknown_field")
        );
        assert_eq!(
            failure(json!({"name": "a", "inner": {"rank": "x"}})),
            pair("/inner/rank", "wrong_type")
        );
        assert_eq!(
            failure(json!({"name": "a", "inner": {"rank": -1}})),
            pair("/inner/rank", "invalid_value")
        );
        assert_eq!(
            failure(json!({"name": "a", "inner": {}})),
            pair("/inner/rank", "missing_field")
        );
        assert_eq!(
            failure(json!({"name": "a", "list": [{"rank": 1}, {"rank": []}]})),
            pair("/list/1/rank", "wrong_type")
        );
        assert_eq!(
            failure(json!({"name": "a", "list": {}})),
            pair("/list", "wrong_type")
        );
        assert_eq!(failure(json!({"name": 3})), pair("/name", "wrong_type"));
        assert_eq!(failure(json!({})), pair("/name", "missing_field"));
        assert_eq!(failure(json!([])), pair("", "wrong_type"));
        let kind = json!({"name": "a", "inner": {"rank": 1, "kind": {"sized": {"px": null}}}});
        assert_eq!(failure(kind), pair("/inner/kind/sized/px", "wrong_type"));
        let kind = json!({"name": "a", "inner": {"rank": 1, "kind": "round"}});
        assert_eq!(failure(kind), pair("/inner/kind", "invalid_value"));
    }

    #[test]
    fn query_parameters_are_parsed_from_text() {
        #[derive(Debug, Deserialize, PartialEq)]
        #[serde(deny_unknown_fields)]
        struct Query {
            limit: Option<u32>,
            name: Option<String>,
            reg: Option<bool>,
        }
        let pairs = |list: &[(&str, &str)]| {
            list.iter()
                .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()))
                .collect()
        };
        let query: Query =
            from_pairs(pairs(&[("limit", "3"), ("name", "5"), ("reg", "true")])).expect("right");
        assert_eq!(
            query,
            Query {
                limit: Some(3),
                name: Some("5".to_owned()),
                reg: Some(true)
            }
        );
        let fails = |list| from_pairs::<Query>(pairs(list)).expect_err("wrong").pointer;
        assert_eq!(fails(&[("limit", "many")]), "/limit");
        assert_eq!(fails(&[("limits", "3")]), "/limits");
        assert_eq!(fails(&[("limit", "3"), ("limit", "4")]), "/limit");
    }
}
