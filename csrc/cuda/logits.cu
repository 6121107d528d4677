#include "ops/logits.h"
