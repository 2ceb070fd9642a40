"""Members become one calibrated answer: weights, temperatures, review rule, score rows."""
