//! JSON read strictly: duplicate keys are errors, integers stay integers, and every key of an object must be asked for.

use std::fmt;

use lawson_core::{Error, Result, problem::Real};
use serde::de::{self, Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};

/// A JSON value; objects keep no duplicate keys.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Json {
    Null,
    Bool(bool),
    /// A number written without fraction or exponent that fits 64 bits.
    Int(i128),
    Float(f64),
    String(String),
    Array(Vec<Json>),
    Object(Vec<(String, Json)>),
}

impl Json {
    /// The one value that `text` holds.
    pub(crate) fn parse(text: &[u8]) -> Result<Json> {
        serde_json::from_slice(text).map_err(|e| Error::invalid(format!("not valid JSON: {e}")))
    }

    /// What an error message calls this value.
    fn describe(&self) -> String {
        match self {
            Json::Null => "null".into(),
            Json::Bool(v) => v.to_string(),
            Json::Int(v) => v.to_string(),
            Json::Float(v) => format!("{v:?}"),
            Json::String(v) => format!("the string {:?}", v.chars().take(40).collect::<String>()),
            Json::Array(_) => "an array".into(),
            Json::Object(_) => "an object".into(),
        }
    }
}

impl<'de> Deserialize<'de> for Json {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct JsonVisitor;
        impl<'de> Visitor<'de> for JsonVisitor {
            type Value = Json;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a JSON value")
            }
            fn visit_unit<E>(self) -> std::result::Result<Json, E> {
                Ok(Json::Null)
            }
            fn visit_bool<E>(self, v: bool) -> std::result::Result<Json, E> {
                Ok(Json::Bool(v))
            }
            fn visit_i64<E>(self, v: i64) -> std::result::Result<Json, E> {
                Ok(Json::Int(v.into()))
            }
            fn visit_u64<E>(self, v: u64) -> std::result::Result<Json, E> {
                Ok(Json::Int(v.into()))
            }
            fn visit_f64<E>(self, v: f64) -> std::result::Result<Json, E> {
                Ok(Json::Float(v))
            }
            fn visit_str<E>(self, v: &str) -> std::result::Result<Json, E> {
                Ok(Json::String(v.into()))
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> std::result::Result<Json, A::Error> {
                let mut items = Vec::new();
                while let Some(item) = seq.next_element()? {
                    items.push(item);
                }
                Ok(Json::Array(items))
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<Json, A::Error> {
                let (mut entries, mut seen) = (Vec::new(), std::collections::HashSet::new());
                while let Some((key, value)) = map.next_entry::<String, Json>()? {
                    if !seen.insert(key.clone()) {
                        return Err(de::Error::custom(format!("the key '{key}' stands twice")));
                    }
                    entries.push((key, value));
                }
                Ok(Json::Object(entries))
            }
        }
        deserializer.deserialize_any(JsonVisitor)
    }
}

/// The keys of one object that have not been taken yet; null counts as absent.
#[derive(Debug)]
pub(crate) struct Fields {
    /// Path of the object, such as `rope.scaling.`; empty at the root.
    path: String,
    entries: Vec<(String, Json)>,
    asked: Vec<&'static str>,
}

impl Fields {
    /// The keys of the object `value`, which stands at `path` (empty at the root).
    pub(crate) fn new(value: Json, path: &str) -> Result<Self> {
        let path = if path.is_empty() { String::new() } else { format!("{path}.") };
        match value {
            Json::Object(entries) => Ok(Fields { path, entries, asked: Vec::new() }),
            other if path.is_empty() => Err(Error::invalid(format!("an object is needed, got {}", other.describe()))),
            other => Err(wrong(path.trim_end_matches('.'), "an object", &other)),
        }
    }

    fn name(&self, key: &str) -> String {
        format!("{}{key}", self.path)
    }

    /// Takes `key`; null and absent are both `None`.
    pub(crate) fn take(&mut self, key: &'static str) -> Option<Json> {
        self.asked.push(key);
        let at = self.entries.iter().position(|(k, _)| k == key)?;
        Some(self.entries.swap_remove(at).1).filter(|v| *v != Json::Null)
    }

    /// Whether `key` is there, be it null, and has not been taken.
    pub(crate) fn contains(&self, key: &str) -> bool {
        self.entries.iter().any(|(k, _)| k == key)
    }

    /// `value` of `key`, or the error that it is missing.
    pub(crate) fn required<T>(&self, key: &str, value: Option<T>) -> Result<T> {
        value.ok_or_else(|| Error::invalid(format!("the key '{}' is missing", self.name(key))))
    }

    /// An integer ≥ 0.
    pub(crate) fn int(&mut self, key: &'static str) -> Result<Option<usize>> {
        match self.take(key) {
            None => Ok(None),
            Some(Json::Int(v)) if v >= 0 && v <= usize::MAX as i128 => Ok(Some(v as usize)),
            Some(other) => Err(wrong(&self.name(key), "an integer of at least 0", &other)),
        }
    }

    pub(crate) fn float(&mut self, key: &'static str) -> Result<Option<Real>> {
        let value = self.take(key);
        value.map(|v| float(&v, &self.name(key))).transpose()
    }

    pub(crate) fn floats(&mut self, key: &'static str) -> Result<Option<Vec<Real>>> {
        match self.take(key) {
            None => Ok(None),
            Some(Json::Array(items)) => {
                let name = self.name(key);
                let item = |(i, v): (usize, &Json)| float(v, &format!("{name}[{i}]"));
                items.iter().enumerate().map(item).collect::<Result<_>>().map(Some)
            }
            Some(other) => Err(wrong(&self.name(key), "an array of numbers", &other)),
        }
    }

    pub(crate) fn boolean(&mut self, key: &'static str) -> Result<Option<bool>> {
        match self.take(key) {
            None => Ok(None),
            Some(Json::Bool(v)) => Ok(Some(v)),
            Some(other) => Err(wrong(&self.name(key), "true or false", &other)),
        }
    }

    pub(crate) fn string(&mut self, key: &'static str) -> Result<Option<String>> {
        match self.take(key) {
            None => Ok(None),
            Some(Json::String(v)) => Ok(Some(v)),
            Some(other) => Err(wrong(&self.name(key), "a string", &other)),
        }
    }

    pub(crate) fn strings(&mut self, key: &'static str) -> Result<Option<Vec<String>>> {
        let Some(value) = self.take(key) else { return Ok(None) };
        let name = self.name(key);
        let Json::Array(items) = value else { return Err(wrong(&name, "an array of strings", &value)) };
        let item = |v: Json| match v {
            Json::String(s) => Ok(s),
            other => Err(wrong(&name, "an array of strings", &other)),
        };
        items.into_iter().map(item).collect::<Result<_>>().map(Some)
    }

    pub(crate) fn ints(&mut self, key: &'static str) -> Result<Option<Vec<usize>>> {
        let Some(value) = self.take(key) else { return Ok(None) };
        let name = self.name(key);
        let Json::Array(items) = value else { return Err(wrong(&name, "an array of integers", &value)) };
        let item = |v: &Json| match v {
            Json::Int(v) if *v >= 0 && *v <= usize::MAX as i128 => Ok(*v as usize),
            other => Err(wrong(&name, "an array of integers of at least 0", other)),
        };
        items.iter().map(item).collect::<Result<_>>().map(Some)
    }

    /// Checks that every value left is a string.
    pub(crate) fn all_strings(&self) -> Result<()> {
        match self.entries.iter().find(|(_, v)| !matches!(v, Json::String(_))) {
            Some((key, other)) => Err(wrong(&self.name(key), "a string", other)),
            None => Ok(()),
        }
    }

    pub(crate) fn object(&mut self, key: &'static str) -> Result<Option<Fields>> {
        let value = self.take(key);
        value.map(|v| Fields::new(v, &self.name(key))).transpose()
    }

    /// Whether every key has been taken.
    pub(crate) fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// The keys and values nobody took.
    pub(crate) fn rest(self) -> Vec<(String, Json)> {
        self.entries
    }

    /// Complains about a key that nobody took.
    pub(crate) fn finish(self) -> Result<()> {
        match self.entries.first() {
            None => Ok(()),
            Some((key, _)) => {
                let place = if self.path.is_empty() { "" } else { &format!(" in {}", self.path.trim_end_matches('.')) };
                Err(Error::invalid(format!("unknown key '{}'; accepted{place}: {}", self.name(key), self.asked.join(", "))))
            }
        }
    }
}

fn float(value: &Json, name: &str) -> Result<Real> {
    let v = match value {
        Json::Int(v) => Some(*v as f64),
        Json::Float(v) => Some(*v),
        _ => None,
    };
    v.and_then(Real::new).ok_or_else(|| wrong(name, "a finite number", value))
}

fn wrong(name: &str, needed: &str, found: &Json) -> Error {
    Error::invalid(format!("{name} must be {needed}, got {}", found.describe()))
}
