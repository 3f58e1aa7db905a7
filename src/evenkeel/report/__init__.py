"""What a study says: numbers first, then sentences, figures and one HTML page.

`numbers` turns trials into summaries and comparisons, `answers` turns those into a sentence for
each question that people ask, `figures` and `page` draw them. Nothing here trains or stores.
"""
