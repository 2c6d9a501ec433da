//! The page of all families, in one of two formats. Chooses the format by the header `Accept`.

use std::{borrow::Cow, fmt, sync::Arc};

use prometheus_client::{
    collector::Collector,
    encoding::{
        DescriptorEncoder, EncodeLabel as _, EncodeLabelSet, EncodeMetric as _, LabelSetEncoder,
        MetricEncoder, NoLabelSet, prometheus_text, text,
    },
    metrics::MetricType,
    registry::Registry,
};

use super::{
    sheet::Sheet,
    store::{Series, SeriesStore},
    table::{FAMILIES, Family, FamilyId, FamilyKind},
};

/// A format that scrapers read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Format {
    /// OpenMetrics 1.0.
    OpenMetrics,
    /// The text format of Prometheus, version 0.0.4.
    Text,
}

impl Format {
    /// The format for a scraper that accepts this. OpenMetrics only for a scraper that names its version 1 and
    /// does not prefer text.
    pub fn accepted(accept: &str) -> Self {
        let ranges = || accept.split(',').map(Range::read);
        let best = |wanted: &dyn Fn(&Range<'_>) -> bool| {
            ranges().filter(wanted).map(|range| range.quality).fold(0.0, f32::max)
        };
        let open = best(&|range| {
            range.media == "application/openmetrics-text" && range.version == Some("1.0.0")
        });
        let text = best(&|range| {
            range.media == "text/plain" && range.version.is_none_or(|version| version == "0.0.4")
        });
        if open > 0.0 && open >= text { Self::OpenMetrics } else { Self::Text }
    }

    /// The exact content type. Prometheus 3 refuses others.
    pub fn content_type(self) -> &'static str {
        match self {
            Self::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
            Self::Text => "text/plain; version=0.0.4; charset=utf-8",
        }
    }
}

/// One of the ranges of `Accept` (RFC 9110, section 12.5.1).
struct Range<'a> {
    media: &'a str,
    version: Option<&'a str>,
    quality: f32,
}

impl<'a> Range<'a> {
    fn read(text: &'a str) -> Self {
        let mut parts = text.split(';').map(str::trim);
        let mut range =
            Self { media: parts.next().unwrap_or_default(), version: None, quality: 1.0 };
        for (name, value) in parts.filter_map(|part| part.split_once('=')) {
            let value = value.trim_matches('"');
            match name {
                "version" => range.version = Some(value),
                "q" => range.quality = value.parse().unwrap_or(0.0),
                _ => {}
            }
        }
        range
    }
}

/// The page. All owners are asked before the first line is written.
pub(super) fn page(format: Format, store: &Arc<SeriesStore>, sheet: Sheet) -> String {
    let mut registry = Registry::default();
    registry.register_collector(Box::new(AllFamilies { store: store.clone(), sheet }));
    let mut page = String::new();
    let written = match format {
        Format::OpenMetrics => text::encode(&mut page, &registry),
        Format::Text => prometheus_text::encode(&mut page, &registry),
    };
    // Writing into memory does not fail.
    debug_assert_eq!(written, Ok(()));
    page
}

/// All families of the table, in its order.
#[derive(Debug)]
struct AllFamilies {
    store: Arc<SeriesStore>,
    sheet: Sheet,
}

impl Collector for AllFamilies {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        for family in FAMILIES {
            let kind = match family.kind {
                FamilyKind::Counter => MetricType::Counter,
                FamilyKind::Gauge => MetricType::Gauge,
                FamilyKind::Histogram(_) => MetricType::Histogram,
            };
            let mut shown = encoder.encode_descriptor(family.name, family.help, None, kind)?;
            // These were read before, and are on the sheet.
            let counted = family.id != FamilyId::LeasesEnded;
            for (values, series) in
                counted.then(|| self.store.series(family.id)).into_iter().flatten()
            {
                in_series(&mut shown, family, &values, |one| match &series {
                    Series::Counter(counter) => counter.encode(one),
                    Series::Gauge(gauge) => gauge.encode(one),
                    Series::Histogram(histogram) => histogram.encode(one),
                    Series::TracedHistogram(histogram) => histogram.encode(one),
                })?;
            }
            for (values, value) in self.sheet.of(family.id) {
                in_series(&mut shown, family, values, |mut one| match family.kind {
                    FamilyKind::Counter => one.encode_counter::<NoLabelSet, f64, f64>(value, None),
                    FamilyKind::Gauge | FamilyKind::Histogram(_) => one.encode_gauge(value),
                })?;
            }
        }
        Ok(())
    }
}

/// Encodes one series: with its labels, if it has some.
fn in_series(
    shown: &mut MetricEncoder<'_>,
    family: &Family,
    values: &[Cow<'static, str>],
    encode: impl FnOnce(MetricEncoder<'_>) -> fmt::Result,
) -> fmt::Result {
    encode(shown.encode_family(&Labels { names: family.labels, values })?)
}

struct Labels<'a> {
    names: &'static [&'static str],
    values: &'a [Cow<'static, str>],
}

impl EncodeLabelSet for Labels<'_> {
    fn encode(&self, encoder: &mut LabelSetEncoder<'_>) -> fmt::Result {
        let mut labels = self.names.iter().zip(self.values);
        labels.try_for_each(|(name, value)| (*name, &**value).encode(encoder.encode_label()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn format_follows_what_a_scraper_accepts() {
        // The headers of Prometheus 2.53 and 3.5.
        let older = "application/openmetrics-text;version=1.0.0;q=0.5,\
                     application/openmetrics-text;version=0.0.1;q=0.4,text/plain;version=0.0.4;q=0.3,*/*;q=0.2";
        let newer = "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,\
                     text/plain;version=1.0.0;escaping=allow-utf-8;q=0.5,text/plain;version=0.0.4;q=0.4,*/*;q=0.1";
        for (accept, format) in [
            (older, Format::OpenMetrics),
            (newer, Format::OpenMetrics),
            ("application/openmetrics-text; version=\"1.0.0\"", Format::OpenMetrics),
            ("application/openmetrics-text;version=0.0.1", Format::Text),
            ("application/openmetrics-text;version=1.0.0;q=0", Format::Text),
            ("application/openmetrics-text;version=1.0.0;q=0.3,text/plain;q=0.5", Format::Text),
            ("text/plain", Format::Text),
            ("*/*", Format::Text),
            ("", Format::Text),
        ] {
            assert_eq!(Format::accepted(accept), format, "{accept}");
        }
    }
}
