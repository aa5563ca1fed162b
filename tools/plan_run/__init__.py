"""Plan a run from small ones: fit laws of loss, learning rate and gradient noise to pilot runs, and read a recipe off.

family.py   models of other sizes with the proportions of a recipe's
ladder.py   the pilot runs: stable phases of several sizes and learning rates, and decays that branch off
laws.py     the laws, and how well they predict
plan.py     the answer for a target
answers.py  every number of it, with where it comes from
doubts.py   what makes the answer less certain
page.py     the answer as a recipe and as a page
"""
