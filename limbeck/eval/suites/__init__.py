"""Named benchmarks, such as GSM8K, read from the files as they were published and measured by a published
protocol: its prompt, examples, extraction, metric and sampling."""
